"""Tables of training runs as columns for the physics: one row per run, seconds and bytes beside.

What a table does not say is filled by the convention of its source, written here once: vTrain ran
Megatron-DeepSpeed (GELU, full recomputation, unfused attention, 2-byte gradients); nanotron and
torchtitan run Llama blocks with fused attention; nanotron accumulates gradients in 4 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pardemo.predict.columns import Columns, finish, take
from pardemo.predict.gpus import Gpu, gpu, network_of
from pardemo.predict.tables import Table, TableError

MEGATRON_VOCAB = 51200.0


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
    readers = {"iterations": _iterations, "layouts": _layouts, "training": _training}
    c, seconds, memory, ran = readers[table.kind](table)
    names = table.text("gpu", "A100")
    facts = [gpu(name) for name in names]
    c |= _machine(table, names, facts, c)
    capacity = np.array([g.memory_bytes for g in facts])
    per_node = table.numbers("gpus_per_node", 8.0)
    nodes = table.numbers("nodes")
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


def _fill(table: Table, **values: float) -> Columns:
    return {k: np.full(len(table), float(v)) for k, v in values.items()}


Read = tuple[Columns, np.ndarray, np.ndarray, np.ndarray]


def _iterations(table: Table) -> Read:
    n = table.numbers
    hidden = n("hidden_size")
    c: Columns = {
        "layers": n("n_layers"),
        "hidden": hidden,
        "heads": n("attention_heads"),
        "kv": n("attention_heads"),
        "ffn": 4 * hidden,
        "seq": n("sequence_length"),
        "tp": n("tensor_parallelism"),
        "dp": n("data_parallelism"),
        "pp": n("pipeline_parallelism"),
        "microbatch": n("micro_batch"),
        "microbatches": n("global_batch") / n("micro_batch") / n("data_parallelism"),
    }
    full = [("full" in x or "true" in x.lower()) for x in table.text("activation_checkpoint")]
    recompute = np.where(full, 2.0, 0.0) if table.has("activation_checkpoint") else 2.0
    c |= _fill(table, matrices=2, flash=0, sp=0, grad_bytes=2, cp=1) | {
        "vocab": table.numbers("vocab", MEGATRON_VOCAB),
        "recompute": np.broadcast_to(recompute, (len(table),)).astype(float),
    }
    return c, n("iter_ms") / 1e3, np.full(len(table), np.nan), np.ones(len(table), bool)


def _layouts(table: Table) -> Read:
    n = table.numbers
    c: Columns = {k: n(k) for k in ("layers", "hidden", "heads", "ffn", "vocab", "seq", "zero")}
    c |= {"dp": n("dp"), "pp": n("pp"), "tp": n("tp"), "microbatch": n("mbs")}
    m = n("gbs") / (c["dp"] * c["microbatch"])
    given = n("grad_acc")
    c["microbatches"] = np.where(np.isfinite(given), given, m)
    c["cp"], c["ep"] = n("cp", 1.0), n("ep", 1.0)
    c["kv"] = np.where(np.isfinite(n("kv_heads")), n("kv_heads"), c["heads"])
    c["recompute"] = 2.0 * n("recompute", 0.0) if _plain(table, "recompute") else _words(table)
    c["sp"] = n("tp_sp", 1.0)
    c["matrices"] = _matrices(table, c)
    c |= _fill(table, flash=1, grad_bytes=4, balanced=1)
    tokens = c["dp"] * c["microbatch"] * c["microbatches"] * c["seq"]
    ranks = c["dp"] * c["tp"] * c["pp"] * c["cp"]
    seconds = n("step_s")
    for rate in (tokens / n("tok_s"), tokens / (n("tok_s_gpu") * ranks)):
        seconds = np.where(np.isfinite(seconds), seconds, rate)
    status = [s.strip().lower() for s in table.text("status", "ok")]
    ran = np.array([s in ("ok", "success", "completed", "") for s in status])
    memory = n("mem_gb") * 1e9
    return c, np.where(ran, seconds, np.nan), np.where(ran, memory, np.nan), ran


def _matrices(table: Table, c: Columns) -> np.ndarray:
    """3 matrices per MLP unless the table's own FLOPs per token say 2."""
    stated = table.numbers("flops_per_token")
    h = c["hidden"]
    attention = h * h * (2 + 2 * c["kv"] / c["heads"])
    base = c["layers"] * attention + c["vocab"] * h

    def flops(matrices: int) -> np.ndarray:
        scores = 12 * c["layers"] * h * c["seq"]
        return 6 * (base + c["layers"] * matrices * h * c["ffn"]) + scores

    two = np.abs(flops(2) / stated - 1) < np.abs(flops(3) / stated - 1)
    return np.where(np.isfinite(stated) & two, 2.0, 3.0)


def _plain(table: Table, column: str) -> bool:
    """Are all cells of the column numbers or empty?"""
    return all(x.strip().replace(".", "", 1).isdigit() or not x.strip() for x in table.text(column))


def _words(table: Table) -> np.ndarray:
    """A recompute column in words: none, selective, full."""
    out = [2.0 if "full" in x else 1.0 if "select" in x else 0.0 for x in table.text("recompute")]
    return np.array(out)


def _training(table: Table) -> Read:
    n = table.numbers
    c: Columns = {k: n(k) for k in ("hidden", "layers", "seq", "vocab", "tp")}
    c["heads"] = n("n_heads")
    kv = n("n_kv_heads")
    c["kv"] = np.where(np.isfinite(kv), kv, c["heads"])
    c["ffn"] = np.where(np.isfinite(n("ffn")), n("ffn"), 4 * c["hidden"])
    c["cp"], c["pp"] = n("cp", 1.0), n("pp", 1.0)
    c["dp"] = n("dp")
    # grouped heads mark Llama blocks: gated MLP, fused attention; Megatron's tables are GPT
    llama = np.isfinite(kv)
    c["matrices"], c["flash"] = np.where(llama, 3.0, 2.0), llama.astype(float)
    gbs = np.where(np.isfinite(n("gbs")), n("gbs"), c["dp"] * n("mbs"))
    per_replica = gbs / c["dp"]
    # torchtitan states the local batch: under a pipeline it is cut into microbatches of one
    local = (c["pp"] > 1) & (per_replica == n("mbs")) & llama
    c["microbatch"] = np.where(local, 1.0, n("mbs"))
    c["microbatches"] = per_replica / c["microbatch"]
    strategy = [s.lower() for s in table.text("strategy")]
    chunked = np.array([2.0 if "interleaved" in s else 1.0 for s in strategy])
    c["chunks"] = np.where(np.isfinite(n("vpp")), n("vpp"), chunked)
    text = [" ".join(x).lower() for x in zip(strategy, table.text("precision"), strict=True)]
    c["zero"] = np.array([3.0 if "fsdp" in s or "3d" in s else 0.0 for s in strategy])
    c["recompute"] = _words(table)
    sequence = ["sequence" in x or "fsdp" in s for x, s in zip(
        table.text("recompute"), strategy, strict=True)]  # fmt: skip
    c["sp"] = np.array(sequence, float)
    c["float8"] = np.array([float("float8" in s or "fp8" in s) for s in text])
    c["compiled"] = np.array([float("compile" in s or "3d" in s) for s in text])
    c["async_tp"] = np.array([float("asynctp" in s.replace(" ", "")) for s in text])
    c["grad_bytes"] = np.where(llama, 4.0, 2.0)
    ranks = c["dp"] * c["tp"] * c["pp"] * c["cp"]
    rate = gbs * c["seq"] / (n("tok_s_gpu") * ranks)
    seconds = np.where(np.isfinite(n("iter_s")), n("iter_s"), rate)
    return c, seconds, n("mem_gib") * 2**30, np.ones(len(table), bool)
