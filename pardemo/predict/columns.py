"""Many (model, layout) pairs as numpy columns, so that a million layouts cost one evaluation.

A `Columns` is a dict of float arrays of one length. `columns(model, layouts)` makes it from
objects; `score` makes it from tables, `layouts` from grids.
"""

from __future__ import annotations

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
    """Layers on the first and the last stage when stages are balanced by cost, head counted.

    A head of V h weights costs as much as V h / active weights of a layer. `empty` counts stages
    that would be left without any parameter: the layout cannot run.
    """
    pp, layers = c["pp"], c["layers"]
    head = c["table_p"] / c["active_p"]
    even = np.ceil(layers / pp)
    share = (layers + head) / pp
    last = np.clip(np.round(share - head), 0.0, layers)
    first = np.ceil((layers - last) / np.maximum(pp - 1, 1))
    balanced = c.get("balanced", np.zeros_like(pp)) > 0
    first = np.where(pp > 1, np.where(balanced, first, even), layers)
    last = np.where(pp > 1, np.where(balanced, last, np.floor(layers / pp)), layers)
    filled = np.where(balanced, np.ceil(layers / share) + 1, layers)
    return {
        "first_layers": first,
        "last_layers": last,
        "empty_stages": np.where(pp > 1, np.maximum(pp - filled, 0.0), 0.0),
    }


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
