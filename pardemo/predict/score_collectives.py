"""Score the curves of collectives: which points were kept, which predicted, and on what ground.

Three kinds of answers are never mixed: sizes inside a curve's measured range (interpolated), node
counts between measured ones at a single size, and curves without a measured point (data sheets).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pardemo.predict.collectives import Curve
from pardemo.predict.gpus import gpu, network_of
from pardemo.predict.stats import errors
from pardemo.predict.tables import Table, TableError
from pardemo.predict.wire import kind_of, wire_factor

Key = tuple[str, str, int, int]
Pairs = list[tuple[float, float]]
# what a data sheet cannot say: the share of a link that a collective reaches, and its latency
REACHED, LATENCY_S = 0.75, 2e-5


def collective_times(table: Table) -> tuple[list[Key], np.ndarray, np.ndarray]:
    """(machine, collective, ranks, nodes) per row, sizes in bytes, times in seconds."""
    size, ranks = table.numbers("size_bytes"), table.numbers("ranks")
    nodes = table.numbers("nodes", 1.0)
    kinds = []
    for line, name in zip(table.lines, table.text("collective"), strict=True):
        try:
            kinds.append(kind_of(name.strip().lower().replace("-", "_")))
        except ValueError as error:
            raise TableError(f"{table.path}: line {line}: {error}") from None
    factors = [
        wire_factor(k, int(n)) if np.isfinite(n) and n >= 1 else np.nan
        for k, n in zip(kinds, ranks, strict=True)
    ]
    seconds = table.numbers("time_us") / 1e6
    by_rate = np.full(len(size), np.nan)
    for column, scale in (
        ("algbw_GBps", np.ones(len(size))),
        ("busbw_GBps", np.array(factors)),
        ("busbw_GBps_mid", np.array(factors)),
    ):
        with np.errstate(divide="ignore", invalid="ignore"):
            one = scale * size / (table.numbers(column) * 1e9)
        by_rate = np.where(np.isfinite(by_rate), by_rate, one)
    _one_truth(table, seconds, by_rate)
    seconds = np.where(np.isfinite(seconds), seconds, by_rate)
    machine = table.text("gpu")
    keys = [
        (g, k, int(r) if np.isfinite(r) else 0, int(n) if np.isfinite(n) else 1)
        for g, k, r, n in zip(machine, kinds, ranks, nodes, strict=True)
    ]
    bad = ~(np.isfinite(seconds) & np.isfinite(size) & (seconds > 0) & (size > 0) & (ranks >= 2))
    bad |= ~(nodes >= 1) | (nodes > 1e7) | (ranks > 1e7)
    if bad.all():
        raise TableError(f"{table.path}: no row has a positive size, a time and 2 ranks or more")
    good = np.flatnonzero(~bad)
    return [keys[i] for i in good], size[good], seconds[good]


def _one_truth(table: Table, seconds: np.ndarray, rates: np.ndarray) -> None:
    """Refuse a table whose times and bandwidths cannot both be right: a wrong unit."""
    both = np.isfinite(seconds) & np.isfinite(rates) & (seconds > 0) & (rates > 0)
    if both.any():
        off = float(np.median(seconds[both] / rates[both]))
        if not 0.1 < off < 10:
            raise TableError(
                f"{table.path}: time_us is {off:.3g} times what size and bandwidth say: is "
                "time_us in microseconds, size_bytes in bytes, the bandwidth in GB/s?"
            )
    elif np.count_nonzero(seconds > 100) > len(seconds) / 2:
        raise TableError(f"{table.path}: most rows take over 100 s: is time_us in microseconds?")


def spread_out(count: int, keep: int) -> np.ndarray:
    """`keep` of `count` places in order, the two ends first, the others evenly between."""
    keep = max(2, min(keep, count))
    return np.unique(np.round(np.linspace(0, count - 1, keep)).astype(int))


def shared(curves: dict[Key, int], wanted: int, seed: int) -> dict[Key, int]:
    """`wanted` points over curves of so many sizes: three each (latency, middle, bandwidth), then
    one more in turn.

    `seed` draws which curves get none where there are too few, and which get one more.
    """
    order = [list(curves)[i] for i in np.random.default_rng(seed).permutation(len(curves))]
    out = dict.fromkeys(curves, 0)
    left = wanted
    for key in order:
        if left >= 3:
            out[key], left = 3, left - 3
    while left and any(0 < out[k] < curves[k] for k in order):
        for key in order:
            if left and 0 < out[key] < curves[key]:
                out[key], left = out[key] + 1, left - 1
    return out


def score_collectives(table: Table, wanted: int | None, seed: int = 0) -> dict[str, Any]:
    """Predict left-out sizes of every curve, and left-out node counts where sizes are single.

    Without `wanted`, every inner point is predicted from all others of its curve. With it, that
    many points are shared out over the curves (ends first) and the others predicted; a curve that
    none were left for is predicted from data sheets, and reported apart.
    """
    keys, size, seconds = collective_times(table)
    if wanted is not None and not 0 <= wanted < len(size):
        why = "leaves nothing to predict" if wanted > 0 else "must be 0 or more"
        raise TableError(f"{table.path}: --calibrate-rows {wanted} {why}: {len(size)} usable rows")
    rows = {k: np.array([i for i, x in enumerate(keys) if x == k]) for k in sorted(set(keys))}
    rows = {k: r[np.argsort(size[r], kind="stable")] for k, r in rows.items()}
    long = {k: len(r) for k, r in rows.items() if len(np.unique(size[r])) >= 3}
    inside: Pairs = []
    unseen: Pairs = []
    used = 0
    given = shared(long, wanted, seed) if wanted is not None else {}
    for key in long:
        r = rows[key]
        if wanted is None:
            inside += _each_from_the_others(key, size[r], seconds[r])
            used += len(r)
        elif given[key]:
            inside += _kept(key, size[r], seconds[r], given[key])
            used += given[key]
        else:
            unseen += [(data_sheet(key, float(size[i])), float(seconds[i])) for i in r]
    found = {"inside": inside, "unseen": unseen}
    found["between_nodes"] = _across_nodes(keys, size, seconds)
    return _report(table, found, len(size), len(rows), used, wanted)


def _report(
    table: Table, found: dict[str, Pairs], rows: int, curves: int, used: int, wanted: int | None
) -> dict[str, Any]:
    """The statistics; "time" is the best founded kind of answer there is, named in "basis"."""
    out: dict[str, Any] = {
        "rows": rows,
        "curves": curves,
        "calibrated": used,
        "how": "each inner point from the others" if wanted is None else "ends and evenly between",
        "predicted": sum(len(p) for p in found.values()),
    }
    for name in ("inside", "between_nodes", "unseen"):
        if pairs := found[name]:
            out[name] = errors(*map(np.array, zip(*pairs, strict=True)))
            out.setdefault("basis", name)
            out.setdefault("time", out[name])
    if "time" not in out:
        raise TableError(f"{table.path}: no curve has 3 sizes or 3 node counts: nothing to predict")
    return out


def data_sheet(key: Key, size: float) -> float:
    """Seconds by the data sheet of the GPU that `key` names: latency + wire bytes / link."""
    machine, kind, ranks, nodes = key
    facts = gpu(machine)
    link = facts.node_link if nodes == 1 else network_of(machine) or facts.network
    members = max(1.0, ranks / nodes) if nodes > 1 else 1.0
    moved = wire_factor(kind, ranks) * size / (REACHED * min(link * members, facts.node_link))
    return LATENCY_S * (1 + np.log2(max(ranks, 2))) / 2 + moved


def _each_from_the_others(key: Key, size: np.ndarray, seconds: np.ndarray) -> Pairs:
    _, kind, ranks, nodes = key
    pairs = []
    for i in range(1, len(size) - 1):
        if size[0] < size[i] < size[-1]:
            others = size != size[i]
            curve = Curve(kind, ranks, nodes, size[others], seconds[others])
            pairs.append((curve(float(size[i]))[0], float(seconds[i])))
    return pairs


def _kept(key: Key, size: np.ndarray, seconds: np.ndarray, keep: int) -> Pairs:
    _, kind, ranks, nodes = key
    kept = spread_out(len(size), keep)
    curve = Curve(kind, ranks, nodes, size[kept], seconds[kept])
    rest = np.setdiff1d(np.arange(len(size)), kept)
    return [(curve(float(size[i]))[0], float(seconds[i])) for i in rest]


def _across_nodes(keys: list[Key], size: np.ndarray, seconds: np.ndarray) -> Pairs:
    """Each inner node count from its two neighbours, log-log, at one size: not a measured curve."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, (machine, kind, _, _) in enumerate(keys):
        groups.setdefault((machine, kind, size[i]), []).append(i)
    pairs = []
    for members in groups.values():
        rows = np.array(members)
        nodes = np.array([keys[i][3] for i in rows], float)
        if len(np.unique(nodes)) < 3 or len(np.unique(nodes)) < len(nodes):
            continue
        rows, nodes = rows[np.argsort(nodes)], np.sort(nodes)
        for i in range(1, len(rows) - 1):
            left, right = rows[i - 1], rows[i + 1]
            share = np.log(nodes[i] / nodes[i - 1]) / np.log(nodes[i + 1] / nodes[i - 1])
            guess = np.exp((1 - share) * np.log(seconds[left]) + share * np.log(seconds[right]))
            pairs.append((float(guess), float(seconds[rows[i]])))
    return pairs
