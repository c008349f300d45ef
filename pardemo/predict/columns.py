"""Many (model, layout) pairs as numpy columns, so that a million layouts cost one evaluation.

A `Columns` is a dict of float arrays of one length. `columns(model, layouts)` makes it from
objects; `score` makes it from tables, `layouts` from grids.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from pardemo.predict.model import RECOMPUTE, Layout, Transformer

Columns = dict[str, np.ndarray]

MODEL_KEYS = ("layers", "hidden", "heads", "kv", "ffn", "matrices", "vocab", "seq", "tied")
LAYOUT_KEYS = ("dp", "tp", "pp", "cp", "ep", "microbatch", "microbatches", "zero", "chunks")
SCHEDULES = ("1f1b", "gpipe", "interleaved", "zb-h1", "zbv")


def columns(
    model: Transformer, layouts: Sequence[Layout], per_node: int = 8, nodes: int | None = None
) -> Columns:
    """The columns of one model under several layouts, ranks placed in nodes of `per_node`."""
    n = len(layouts)
    c: Columns = {k: np.full(n, float(getattr(model, k))) for k in MODEL_KEYS}
    c |= {k: np.array([float(getattr(x, k)) for x in layouts]) for k in LAYOUT_KEYS}
    c["experts"] = np.full(n, float(model.experts))
    c["top_k"] = np.full(n, float(model.top_k if model.experts else 1))
    c["recompute"] = np.array([float(RECOMPUTE.index(x.recompute)) for x in layouts])
    c["sp"] = np.array([float(x.sequence_parallel) for x in layouts])
    c["schedule"] = np.array([float(SCHEDULES.index(x.schedule)) for x in layouts])
    c["bytes"] = np.array([float(x.bytes_per_element) for x in layouts])
    c["mixed"] = np.array([float(x.mixed) for x in layouts])
    return finish(c, per_node, nodes)


def finish(c: Columns, per_node: float | np.ndarray = 8, nodes: int | None = None) -> Columns:
    """Fill in what follows: ranks, nodes, each stage's layers and parameters."""
    n = len(c["hidden"])
    defaults = {"cp": 1, "ep": 1, "chunks": 1, "zero": 0, "sp": 1, "recompute": 0, "tied": 1}
    defaults |= {"bytes": 2, "mixed": 1, "experts": 0, "top_k": 1, "schedule": 0, "flash": 1}
    for key, value in defaults.items():
        c.setdefault(key, np.full(n, float(value)))
    c["per_node"] = np.broadcast_to(np.asarray(per_node, float), (n,)).copy()
    c["ranks"] = c["dp"] * c["tp"] * c["pp"] * c["cp"]
    c["nodes"] = np.full(n, float(nodes)) if nodes else np.ceil(c["ranks"] / c["per_node"])
    h = c["hidden"]
    c["attention_p"] = h * h * (2 + 2 * c["kv"] / c["heads"])
    expert = c["matrices"] * h * c["ffn"]
    c["expert_p"] = np.where(c["experts"] > 0, c["experts"], 0.0) * expert
    c["dense_p"] = c["attention_p"] + np.where(c["experts"] > 0, c["experts"] * h, expert) + 2 * h
    c["layer_p"] = c["dense_p"] + c["expert_p"]
    c["active_p"] = c["attention_p"] + c["top_k"] * expert
    c["table_p"] = c["vocab"] * h
    return c | stage_split(c)


def stage_split(c: Columns) -> Columns:
    """Layers of the first stage, the last, and the fullest but the last; stages left empty.

    Even by count, or by cost where the column `balanced` is set (`by_cost`). A
    stage is empty when it holds neither a layer nor the head.
    """
    pp, layers = c["pp"], c["layers"]
    first = np.where(pp > 1, np.ceil(layers / pp), layers)
    last = np.where(pp > 1, np.floor(layers / pp), layers)
    out = {"first_layers": first, "last_layers": last, "inner_layers": first.copy()}
    out["empty_stages"] = np.maximum(pp - layers, 0.0)
    head = np.round(c["table_p"] / c["active_p"], 6)
    for i in np.flatnonzero((c.get("balanced", 0 * pp) > 0) & (pp > 1)):
        stages, with_head = by_cost(int(layers[i]), float(head[i]), int(pp[i]))
        out["first_layers"][i], out["last_layers"][i] = stages[0], stages[with_head]
        out["inner_layers"][i] = stages[:with_head].max(initial=0)
        out["empty_stages"][i] = np.count_nonzero(stages == 0) - (stages[with_head] == 0)
    return out


@functools.lru_cache(maxsize=4096)
def by_cost(layers: int, head: float, pp: int) -> tuple[np.ndarray, int]:
    """(layers on each stage, the stage of the head) by shares of the cost; a layer costs 1.

    Blocks are dealt out in order; a stage is left before the block with which the cost so far
    would pass its share (r + 1)/p of the whole. nanotron's `build_model` (src/nanotron/models/
    base.py, commit 01de8d9) leaves it after that block; the published runs fit this rule better,
    and LOG.md says by how much.
    """
    counts, stage, share = np.zeros(pp), 0, (layers + head) / pp
    for k in range(1, layers + 1):
        stage += int(k > share * (stage + 1) and stage < pp - 1)
        counts[stage] += 1
    stage += int(layers + head > share * (stage + 1) and stage < pp - 1)
    return counts, stage


def cannot_start(c: Columns) -> np.ndarray:
    """Layouts with stages that hold no parameter and therefore fail whatever the memory.

    More than one such stage, or one whose unsharded replicas DistributedDataParallel refuses
    ("not needed when a module doesn't have any parameters"). A lone one computes the loss.
    """
    lone = (c["zero"] >= 1) | (c["dp"] == 1)
    may = (c.get("balanced", 0 * c["pp"]) > 0) & (c["empty_stages"] == 1) & lone
    return (c["empty_stages"] > 0) & ~may


def take(c: Columns, index: np.ndarray | slice) -> Columns:
    """The rows of `index`."""
    return {k: v[index] for k, v in c.items()}


def parameters_per_rank(c: Columns, stage: str = "first") -> tuple[np.ndarray, np.ndarray]:
    """(dense, expert) parameters a rank holds before any ZeRO sharding, on an end stage.

    The first stage holds the input table, the last one the head (the same table when tied, and a
    second copy of it when there are stages). One stage holds the table once when tied.
    """
    layers = c["first_layers"] if stage == "first" else c["last_layers"]
    alone = np.where(c["tied"] > 0, 1.0, 2.0)
    tables = np.where(c["pp"] == 1, alone, 1.0) * c["table_p"]
    dense = (layers * c["dense_p"] + tables) / c["tp"]
    return dense, layers * c["expert_p"] / c["tp"] / c["ep"]


def in_flight(c: Columns) -> np.ndarray:
    """Microbatches of activations alive on the first rank at the peak, in whole-rank units.

    1F1B and the zero-bubble schedules min(m, p); GPipe m; interleaved p (1 + (p-1)/(p v)).
    """
    p, m = c["pp"], c["microbatches"]
    more = np.minimum(m, p * (1 + (p - 1) / (p * c["chunks"])))
    by = {SCHEDULES.index("gpipe"): m, SCHEDULES.index("interleaved"): more}
    out = np.minimum(m, p)
    for code, value in by.items():
        out = np.where(c["schedule"] == code, value, out)
    return np.where(p == 1, 1.0, out)
