"""Tables of training runs as columns for the physics: one row per run, seconds and bytes beside.

`runs(table)` drops, with a reason, the rows that contradict themselves; `runs_read.py` knows how
each kind of table spells a run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pardemo.predict.columns import Columns, finish, take
from pardemo.predict.gpus import Gpu, gpu, network_of
from pardemo.predict.runs_read import iterations, layout_rows, training
from pardemo.predict.tables import Table, TableError


@dataclass(frozen=True)
class Runs:
    """Usable runs: physics `columns`, measured `seconds` (nan if not) and `memory` in bytes.

    `ran` is False for runs that ran out of memory. `group` names machine and source, `where` the
    model and node count within which layouts compete, `tokens` per step; `skipped` says why rows
    fell out; `unknown` GPUs not in the data sheets.
    """

    columns: Columns
    seconds: np.ndarray
    memory: np.ndarray
    ran: np.ndarray
    group: np.ndarray
    where: np.ndarray
    tokens: np.ndarray
    capacity: np.ndarray
    rows: np.ndarray
    skipped: dict[str, int]
    unknown: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.seconds)

    def select(self, index: np.ndarray) -> Runs:
        """The rows of `index`."""
        fields = ("seconds", "memory", "ran", "group", "where", "tokens", "capacity", "rows")
        picked = {f: getattr(self, f)[index] for f in fields}
        return Runs(take(self.columns, index), **picked, skipped=self.skipped, unknown=self.unknown)


def runs(table: Table) -> Runs:
    """The runs of an "iterations", "layouts" or "training" table."""
    readers = {"iterations": iterations, "layouts": layout_rows, "training": training}
    c, seconds, memory, ran = readers[table.kind](table)
    names = table.text("gpu", "A100")
    facts = [gpu(name) for name in names]
    c |= _machine(table, names, facts, c)
    capacity = np.array([g.memory_bytes for g in facts])
    per_node = table.numbers("gpus_per_node", 8.0)
    nodes = table.numbers("nodes")
    bad, skipped = _unusable(table, c, seconds, memory, ran)
    if bad.all():
        why = "; ".join(f"{v} rows: {k}" for k, v in skipped.items())
        raise TableError(f"{table.path}: no usable row ({why})")
    good = np.flatnonzero(~bad)
    c = finish(take(c, good), per_node[good])
    known = nodes[good]
    c["nodes"] = np.where(np.isfinite(known), known, c["nodes"])
    source = [f"{n} | {t}" for n, t in zip(names, table.text("table", ""), strict=True)]
    label = [f"{m}" for m in table.text("model", "")]
    shape = [f"{int(a)}x{int(b)}" for a, b in zip(c["layers"], c["hidden"], strict=True)]
    tokens = c["dp"] * c["microbatch"] * c["microbatches"] * c["seq"]
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
        tokens,
        capacity[good],
        np.array(table.lines)[good],
        skipped,
        unknown,
    )


def _unusable(
    table: Table, c: Columns, seconds: np.ndarray, memory: np.ndarray, ran: np.ndarray
) -> tuple[np.ndarray, dict[str, int]]:
    """Rows that cannot be used, and how many fell out for which reason."""
    product = c["dp"] * c["tp"] * c["pp"] * c["cp"]
    stated = table.numbers("n_gpus", np.nan) if table.has("n_gpus") else table.numbers("gpus")
    reasons = {
        "a size is missing or below 1": ~_all_positive(c),
        "neither a time nor a memory reading": ~(np.isfinite(seconds) | np.isfinite(memory) | ~ran),
        "dp x tp x pp is not the number of GPUs": np.isfinite(stated) & (stated != product),
        "a time or memory that is not positive": (seconds <= 0) | (memory <= 0),
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
    keys = ("layers", "hidden", "heads", "ffn", "vocab", "seq", "dp", "tp", "pp", "microbatch")
    stacked = np.stack([c[k] for k in (*keys, "microbatches", "cp")])
    return (np.isfinite(stacked) & (stacked >= 1)).all(axis=0)


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
