"""Tables of training runs as columns for the physics: one row per run, seconds and bytes beside.

`runs(table)` drops, with a reason, the rows that contradict themselves; `runs_read.py` knows how
each kind of table spells a run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pardemo.predict.columns import Columns, finish, take
from pardemo.predict.gpus import Gpu, gpu, network_of
from pardemo.predict.model import LARGEST
from pardemo.predict.runs_read import iterations, layout_rows, training
from pardemo.predict.tables import Table, TableError


@dataclass(frozen=True)
class Runs:
    """Usable runs: physics `columns`, measured `seconds` (nan if not) and `memory` in bytes.

    `ran` is False for runs that ran out of memory. `group` names machine and source, `where` the
    model and node count within which layouts compete, `name` a run in words, `tokens` per step;
    `rows` are lines of the file; `skipped` says why rows fell out; `unknown` GPUs not in the data
    sheets.
    """

    columns: Columns
    seconds: np.ndarray
    memory: np.ndarray
    ran: np.ndarray
    group: np.ndarray
    where: np.ndarray
    name: np.ndarray
    tokens: np.ndarray
    capacity: np.ndarray
    rows: np.ndarray
    skipped: dict[str, int]
    unknown: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.seconds)

    def select(self, index: np.ndarray) -> Runs:
        """The rows of `index`."""
        fields = [
            "seconds",
            "memory",
            "ran",
            "group",
            "where",
            "name",
            "tokens",
            "capacity",
            "rows",
        ]
        picked = {f: getattr(self, f)[index] for f in fields}
        return Runs(take(self.columns, index), **picked, skipped=self.skipped, unknown=self.unknown)


def runs(table: Table) -> Runs:
    """The runs of an "iterations", "layouts" or "training" table."""
    readers = {"iterations": iterations, "layouts": layout_rows, "training": training}
    with np.errstate(all="ignore"):  # a zero or an absurd size drops its row below, with a reason
        c, seconds, memory, ran = readers[table.kind](table)
    names = table.text("gpu", "A100")
    facts = [gpu(name) for name in names]
    c |= _machine(table, names, facts, c)
    capacity = np.array([g.memory_bytes for g in facts])
    per_node = table.numbers("gpus_per_node", 8.0)
    nodes = table.numbers("nodes")
    for name, column in (("gpus_per_node", per_node), ("nodes", nodes)):
        c[name] = np.where(np.isfinite(column), column, 1.0)
    bad, skipped = _unusable(table, c, seconds, memory, ran)
    if bad.all():
        why = "; ".join(f"{v} rows: {k}" for k, v in skipped.items())
        raise TableError(f"{table.path}: no usable row ({why})")
    good = np.flatnonzero(~bad)
    c = finish(take(c, good), per_node[good])
    stated_nodes = nodes[good]
    c["nodes"] = np.where(np.isfinite(stated_nodes), stated_nodes, c["nodes"])
    tokens = c["dp"] * c["microbatch"] * c["microbatches"] * c["seq"]
    known = np.array([g.known for g in facts]) | np.isfinite(table.numbers("peak_tflops"))
    check_units(table, c, tokens, seconds[good], known[good])
    check_memory(table, memory[good], capacity[good])
    source = [f"{n} | {t}" for n, t in zip(names, table.text("table", ""), strict=True)]
    label = [f"{m}" for m in table.text("model", "")]
    shape = [f"{int(a)}x{int(b)}" for a, b in zip(c["layers"], c["hidden"], strict=True)]
    where = [
        f"{label[r]} {shape[i]} on {int(c['ranks'][i])} GPUs, {tokens[i]:.0f} tokens"
        for i, r in enumerate(good)
    ]
    unknown = tuple(sorted({g.name for g in facts if not g.known}))
    return Runs(
        c,
        seconds[good],
        memory[good],
        ran[good],
        np.array(source)[good],
        np.array(where),
        np.array([_in_words(label[r], c, i) for i, r in enumerate(good)]),
        tokens,
        capacity[good],
        np.array(table.lines)[good],
        skipped,
        unknown,
    )


def _in_words(label: str, c: Columns, i: int) -> str:
    """Run `i` as one would say it: model, GPUs, every axis of more than one rank, microbatches."""
    model = label.strip() or f"{int(c['layers'][i])} layers of {int(c['hidden'][i])}"
    axes = [f"{axis}{int(c[axis][i])}" for axis in ("dp", "tp", "pp", "cp") if c[axis][i] > 1]
    each = f"{int(c['microbatches'][i])} x {int(c['microbatch'][i])} sequences"
    again = ("", ", some recomputed", ", all recomputed")[int(c["recompute"][i])]
    return f"{model} on {int(c['ranks'][i])} GPUs, {' '.join(axes) or 'one rank'}, {each}{again}"


UNITS = {
    "iterations": "iter_ms in milliseconds and global_batch in sequences",
    "layouts": "step_s in seconds and tok_s_gpu in tokens per second",
    "training": "iter_s in seconds and tok_s_gpu in tokens per second",
}
# nothing sold computes faster than this, FLOP/s of one device in 16 bits
FASTEST = 3e15


def check_units(
    table: Table, c: Columns, tokens: np.ndarray, seconds: np.ndarray, known: np.ndarray
) -> None:
    """Refuse a table most of whose rows beat their GPU's peak, or reach 1/500 of it: wrong units.

    The causal half of attention is not counted, and float8 may double the peak.
    """
    scores = 6 * c["layers"] * c["hidden"] * c["seq"]
    per_token = 6 * (c["layers"] * c["active_p"] + c["table_p"]) + scores
    rate = per_token * tokens / seconds / c["ranks"]
    timed = np.isfinite(rate)
    if not timed.any():
        return
    limit = np.where(known, c["peak"] * np.where(c.get("float8", 0 * tokens) > 0, 2, 1), FASTEST)
    share = float(np.median((rate / limit)[timed]))
    if share > 1:
        word = f"are {share:.3g} times faster than their GPUs can compute"
    elif share < 0.002 and known[timed].all():
        word = f"reach {share:.1g} of their GPUs' peak"
    else:
        return
    raise TableError(f"{table.path}: most rows {word}: is {UNITS[table.kind]}?")


def check_memory(table: Table, memory: np.ndarray, capacity: np.ndarray) -> None:
    """Refuse memory readings that most devices could not hold, or that are next to nothing."""
    share = (memory / capacity)[np.isfinite(memory)]
    middle = float(np.median(share)) if len(share) else 0.5
    if not 0.0005 < middle < 3:
        column = "mem_gb in GB" if table.has("mem_gb") else "mem_gib in GiB"
        raise TableError(
            f"{table.path}: memory readings are {middle:.3g} times the device's memory in the "
            f"median: is {column}?"
        )


def _unusable(
    table: Table, c: Columns, seconds: np.ndarray, memory: np.ndarray, ran: np.ndarray
) -> tuple[np.ndarray, dict[str, int]]:
    """Rows that cannot be used, and how many fell out for which reason."""
    product = c["dp"] * c["tp"] * c["pp"] * c["cp"]
    stated = table.numbers("n_gpus", np.nan) if table.has("n_gpus") else table.numbers("gpus")
    reasons = {
        "a size is missing or below 1": ~_all_positive(c),
        "a size is beyond any model or cluster": _absurd(c),
        "zero is missing or not 0, 1, 2 or 3": ~np.isin(
            c.get("zero", np.zeros(len(table))), (0, 1, 2, 3)
        ),
        "neither a time nor a memory reading": ~(np.isfinite(seconds) | np.isfinite(memory) | ~ran),
        "dp x tp x pp is not the number of GPUs": np.isfinite(stated) & (stated != product),
        "a time below a nanosecond or memory below a byte": (seconds < 1e-9) | (memory < 1),
    }
    bad = np.zeros(len(table), bool)
    skipped = {}
    for why, which in reasons.items():
        new = which & ~bad
        if new.any():
            skipped[why] = int(new.sum())
        bad |= which
    return bad, skipped


def _all_positive(c: Columns) -> np.ndarray:
    keys = ["layers", "hidden", "heads", "ffn", "vocab", "seq", "dp", "tp", "pp", "microbatch"]
    keys += ["microbatches", "cp", "nodes", "gpus_per_node"]
    stacked = np.stack([c[k] for k in keys])
    return (np.isfinite(stacked) & (stacked >= 1)).all(axis=0)


def _absurd(c: Columns) -> np.ndarray:
    """Rows with a size that no model or cluster has; the physics would loop or overflow."""
    most = {k: LARGEST[k] for k in ("layers", "hidden", "heads", "ffn", "vocab", "seq")}
    most |= dict.fromkeys(("dp", "tp", "pp", "cp", "microbatch", "microbatches", "nodes"), 10**7)
    return np.any([c[k] > v for k, v in most.items()], axis=0)


def _machine(table: Table, names: list[str], facts: list[Gpu], c: Columns) -> Columns:
    """Peak, memory bandwidth and links per row; columns of the table win over data sheets."""
    peak = np.array([g.peak_flops for g in facts])
    stated = table.numbers("peak_tflops") * 1e12
    network = [network_of(n) or g.network for n, g in zip(names, facts, strict=True)]
    configured = table.numbers("inter_Gbps_cfg") * 1e9 / 8 / 8
    configured = np.where(np.isfinite(configured), configured, network)
    return {
        "peak": np.where(np.isfinite(stated), stated, peak),
        "hbm": np.array([g.memory_bandwidth for g in facts]),
        "node_link": np.array([g.node_link for g in facts]),
        "net_link": configured,
    }
