"""How each kind of table spells a run: its columns as those of the physics.

What a table does not say is filled by the convention of its source, written here once: vTrain ran
Megatron-DeepSpeed (GELU, full recomputation, unfused attention, 2-byte gradients); nanotron and
torchtitan run Llama blocks with fused attention; nanotron accumulates gradients in 4 bytes.
"""

from __future__ import annotations

import numpy as np

from pardemo.predict.columns import Columns
from pardemo.predict.tables import Table

MEGATRON_VOCAB = 51200.0


def _fill(table: Table, **values: float) -> Columns:
    return {k: np.full(len(table), float(v)) for k, v in values.items()}


Read = tuple[Columns, np.ndarray, np.ndarray, np.ndarray]


def iterations(table: Table) -> Read:
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


def layout_rows(table: Table) -> Read:
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


def training(table: Table) -> Read:
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
