"""Score the predictor on tables of collectives, and of DataParallel and DDP against one GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import least_squares

from pardemo.predict.collectives import Curve
from pardemo.predict.stats import errors
from pardemo.predict.tables import Table, TableError
from pardemo.predict.wire import kind_of, wire_factor


def collective_times(table: Table) -> tuple[list[tuple[Any, ...]], np.ndarray, np.ndarray]:
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
    for column, scale in (
        ("algbw_GBps", np.ones(len(size))),
        ("busbw_GBps", np.array(factors)),
        ("busbw_GBps_mid", np.array(factors)),
    ):
        from_rate = scale * size / (table.numbers(column) * 1e9)
        seconds = np.where(np.isfinite(seconds), seconds, from_rate)
    machine = table.text("gpu")
    keys = [
        (g, k, int(r) if np.isfinite(r) else 0, int(n))
        for g, k, r, n in zip(machine, kinds, ranks, nodes, strict=True)
    ]
    bad = ~(np.isfinite(seconds) & np.isfinite(size) & (seconds > 0) & (size > 0) & (ranks >= 2))
    if bad.all():
        raise TableError(f"{table.path}: no row has a positive size, a time and 2 ranks or more")
    good = np.flatnonzero(~bad)
    return [keys[i] for i in good], size[good], seconds[good]


def spread_out(count: int, keep: int) -> np.ndarray:
    """`keep` of `count` places in order, the two ends first, the others evenly between."""
    keep = max(2, min(keep, count))
    return np.unique(np.round(np.linspace(0, count - 1, keep)).astype(int))


def score_collectives(table: Table, wanted: int | None) -> dict[str, Any]:
    """Predict left-out sizes of every curve, and left-out node counts where sizes are single.

    Without `wanted`, every inner point is predicted from all others of its curve. With it, that
    many points are shared out over the curves (ends first) and the others predicted; a curve left
    with points outside its kept range, or with one point, is reported as extrapolated.
    """
    keys, size, seconds = collective_times(table)
    inside: list[tuple[float, float]] = []
    outside: list[tuple[float, float]] = []
    curves = sorted(set(keys))
    used = 0
    each = None if wanted is None else max(2, wanted // len(curves))
    for key in curves:
        rows = np.array([i for i, k in enumerate(keys) if k == key])
        rows = rows[np.argsort(size[rows])]
        if len(np.unique(size[rows])) < 3:
            continue
        found, kept = _one_curve(key, size[rows], seconds[rows], each)
        inside += found
        used += kept
    outside += _across_nodes(keys, size, seconds)
    out: dict[str, Any] = {
        "rows": len(size),
        "curves": len(curves),
        "calibrated": used,
        "how": "each inner point from the others" if wanted is None else "ends and evenly between",
        "predicted": len(inside) + len(outside),
    }
    if inside:
        out["time"] = errors(*map(np.array, zip(*inside, strict=True)))
    if outside:
        out["extrapolated_nodes"] = errors(*map(np.array, zip(*outside, strict=True)))
    if not inside and not outside:
        raise TableError(f"{table.path}: no curve has 3 sizes or 3 node counts: nothing to predict")
    return out


def _one_curve(
    key: tuple[Any, ...], size: np.ndarray, seconds: np.ndarray, each: int | None
) -> tuple[list[tuple[float, float]], int]:
    _, kind, ranks, nodes = key
    pairs = []
    if each is None:
        for i in range(1, len(size) - 1):
            if not size[0] < size[i] < size[-1]:
                continue
            others = size != size[i]
            curve = Curve(kind, ranks, nodes, size[others], seconds[others])
            pairs.append((curve(float(size[i]))[0], float(seconds[i])))
        return pairs, len(size)
    kept = spread_out(len(size), each)
    curve = Curve(kind, ranks, nodes, size[kept], seconds[kept])
    for i in np.setdiff1d(np.arange(len(size)), kept):
        pairs.append((curve(float(size[i]))[0], float(seconds[i])))
    return pairs, len(kept)


def _across_nodes(
    keys: list[tuple[Any, ...]], size: np.ndarray, seconds: np.ndarray
) -> list[tuple[float, float]]:
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


DDP_NAMES = ("wrapper_share", "inside_share", "across_share", "gather_share", "slow_link_share")
DDP_MEANING = {
    "wrapper_share": "DDP's own work, as a share of one GPU's step",
    "inside_share": "exposed all-reduce inside a node, at (n-1)/n, as a share of one GPU's step",
    "across_share": "the same between nodes",
    "gather_share": "DataParallel's replicate, scatter and gather, at (n-1)/n",
    "slow_link_share": "exposed all-reduce without NVLink",
}
_LOW, _HIGH = np.array([0.0, 0, 0, 0, 0]), np.array([0.3, 1.5, 2, 3, 4])


def score_ddp(table: Table, wanted: int | None, seed: int) -> dict[str, Any]:
    """One GPU's step is given per model; shares of it are fitted on N rows, the rest predicted."""
    step, gpus, base, kind, names = _ddp_rows(table)
    rest = np.flatnonzero(np.isfinite(step) & np.isfinite(base) & (kind != "base"))
    if len(rest) < 2:
        raise TableError(f"{table.path}: fewer than 2 rows beside each model's one-GPU row")
    wanted = min(8, len(rest) // 2) if wanted is None else wanted
    if wanted >= len(rest):
        raise TableError(f"{table.path}: --calibrate-rows {wanted} of {len(rest)} leaves nothing")
    learn = np.random.default_rng(seed).permutation(rest)[:wanted]
    usual = np.array([0.03, 0.05, 0.1, 0.5, 1.0])

    def residual(theta: np.ndarray) -> np.ndarray:
        mine = _ddp_model(theta, gpus[learn], base[learn], kind[learn])
        return np.concatenate([np.log(mine / step[learn]) / 0.05, 0.3 * (theta - usual) / usual])

    theta = least_squares(residual, usual, bounds=(_LOW, _HIGH), loss="soft_l1").x
    test = np.setdiff1d(rest, learn)
    predicted = _ddp_model(theta, gpus[test], base[test], kind[test])
    bounds = zip(DDP_NAMES, theta, _LOW, _HIGH, strict=True)
    constants = {
        n: {"value": v, "unit": "share", "low": lo, "high": hi, "meaning": DDP_MEANING[n]}
        for n, v, lo, hi in bounds
    }
    return {
        "rows": len(step),
        "calibrated": len(learn),
        "given": int((kind == "base").sum()),
        "predicted": len(test),
        "time": errors(predicted, step[test]),
        "constants": constants,
        "models": len(set(names)),
    }


def _ddp_model(
    theta: np.ndarray, gpus: np.ndarray, base: np.ndarray, kind: np.ndarray
) -> np.ndarray:
    wrapper, inside, across, gather, slow = theta
    share = (gpus - 1) / gpus
    extra = wrapper + inside * share
    extra = np.where(kind == "across", wrapper + across * share, extra)
    extra = np.where(kind == "dp", gather * share, extra)
    extra = np.where(kind == "slow", wrapper + slow * share, extra)
    return base * (1 + extra)


def _ddp_rows(
    table: Table,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """(seconds, GPUs, one GPU's seconds, kind of row, model) of every row."""
    gpus = table.numbers("gpus", 1.0)
    step = table.numbers("iter_s_p50")
    batch = table.numbers("mbs", 1.0)
    step = np.where(np.isfinite(step), step, batch / table.numbers("ex_s_per_gpu"))
    step = np.where(np.isfinite(step), step, 1 / table.numbers("steps_s"))
    names = [f"{m} {s} {b}" for m, s, b in zip(
        table.text("model"), table.text("seq"), table.text("mbs"), strict=True)]  # fmt: skip
    strategy = [s.strip().lower() for s in table.text("strategy")]
    config = [s.strip().lower() for s in table.text("config")]
    kind = np.array(["inside"] * len(table), dtype=object)
    for i, (s, text) in enumerate(zip(strategy, config, strict=True)):
        if "no_nvlink" in s or "no nvlink" in text:
            kind[i] = "slow"
        elif s == "dp":
            kind[i] = "dp"
        elif "/" in text and not text.startswith("1m"):
            kind[i] = "across"
    base = np.full(len(table), np.nan)
    for name in set(names):
        rows = [i for i, n in enumerate(names) if n == name and np.isfinite(step[i])]
        alone = [i for i in rows if strategy[i] == "single"] or [i for i in rows if gpus[i] == 1]
        if alone:
            base[[i for i, n in enumerate(names) if n == name]] = step[alone[0]]
            kind[alone[0]] = "base"
    return step, gpus, base, kind.astype(str), names
