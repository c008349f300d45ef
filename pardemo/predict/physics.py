"""Seconds of one training step of a transformer, term by term, for many layouts at once.

Inputs are `Columns` plus four facts of the machine per row: `peak` FLOP/s, `hbm`, `node_link` and
`net_link` bytes/s; and the constants of `constants.TIME`. Ranks are placed tensor innermost, then
context, data, pipeline outermost, as Megatron, nanotron and torchtitan do.

step = m x slowest stage + bubble + stage transfers + exposed gradients + optimiser + fixed costs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pardemo.predict.columns import SCHEDULES, Columns, parameters_per_rank
from pardemo.predict.constants import TIME, named

Constants = dict[str, float]
MACHINE_KEYS = ("peak", "hbm", "node_link", "net_link")
# how sharply the larger of two overlapping times wins; 4 leaves 19 % extra when they are equal
SHARPNESS = 4.0

TERMS = {
    "compute": "m x slowest stage: matrix products and memory traffic",
    "launch": "m x slowest stage: issuing kernels takes longer than running them",
    "tensor": "m x layers x (2 forward + 2 backward) collectives of the activation",
    "context": "m x layers x (c-1)/c of K and V, forward and twice backward",
    "experts": "m x layers x 4 all-to-alls of the routed tokens",
    "head": "m x the head's and the loss's extra on the last stage",
    "bubble": "one microbatch through the other stages, / v",
    "transfer": "(m v + p - 1) x 2 sends of the activation between stages",
    "exposed": "gradients (and ZeRO's parameters), the share that is not hidden",
    "optimizer": "bytes moved per parameter / memory bandwidth",
    "fixed": "per microbatch, per step and per rank",
    "allocator": "cached blocks freed and asked for again where memory is nearly full",
}


def softmax2(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A smooth maximum of two times that run side by side."""
    return (a**SHARPNESS + b**SHARPNESS) ** (1 / SHARPNESS)


def product(c: Columns, k: Constants) -> Callable[..., np.ndarray]:
    """Time of a (rows x inner) (inner x cols) product: small ones run below the peak."""
    rate = c["peak"] * k["matmul_efficiency"]

    def time(rows: np.ndarray, cols: np.ndarray, inner: np.ndarray) -> np.ndarray:
        thin = (1 + k["half_width"] / cols) * (1 + k["half_width"] / inner)
        return 2 * rows * cols * inner / rate * (1 + k["half_tokens"] / rows) * thin

    return time


def layer_forward(c: Columns, k: Constants) -> tuple[np.ndarray, np.ndarray]:
    """(one layer's forward, its attention scores alone) in seconds, without transfers."""
    tokens = c["microbatch"] * c["seq"] / c["cp"]
    h, f, tp = c["hidden"], c["ffn"], c["tp"]
    gemm = product(c, k)
    kv = 1 + 2 * c["kv"] / c["heads"]
    time = gemm(tokens, h * kv / tp, h) + gemm(tokens, h, h / tp)
    routed = tokens * c["top_k"]
    time = time + gemm(routed, (c["matrices"] - 1) * f / tp, h) + gemm(routed, h, f / tp)
    mask = np.where(c["flash"] > 0, 0.5, 1.0)  # fused kernels skip the masked half
    narrow = 1 + 2 * k["half_width"] / (h / c["heads"])
    rate = c["peak"] * k["matmul_efficiency"]
    scores = mask * 4 * tokens * c["seq"] * h / tp / rate * narrow
    outside = np.where(c["sp"] > 0, tp, 1.0)
    moved = 10 * h / outside + (8 * h + c["matrices"] * f) / tp
    moved = moved + np.where(c["flash"] > 0, 0.0, 5 * c["seq"] * c["heads"] / tp)
    return time + scores + tokens * c["bytes"] * moved / (c["hbm"] * k["memory_bandwidth"]), scores


def collective(
    c: Columns,
    k: Constants,
    ranks: np.ndarray,
    size: np.ndarray,
    inner: np.ndarray,
    slower: np.ndarray | float = 1.0,
) -> np.ndarray:
    """An all-reduce of `size` bytes over `ranks` that lie `inner` ranks apart in the machine.

    A group inside a node uses its links. One that spans nodes is a ring over the network, which
    several members of a node share the load of; it slows as it reaches more nodes. Latency counts
    a ring's steps, times `slower`.
    """
    spans = ranks * inner > c["per_node"]
    members = np.clip(c["per_node"] / inner, 1.0, c["per_node"])
    reached = np.maximum(ranks * inner / c["per_node"], 1.0)
    node = c["node_link"] * k["node_bandwidth"]
    net = c["net_link"] * members * k["net_bandwidth"] / (1 + reached / k["net_half_nodes"])
    rate = np.where(spans, np.minimum(net, node), node)
    latency = np.where(spans, k["net_latency_s"], k["tp_latency_s"])
    moved = 2 * (ranks - 1) / ranks * size / rate
    return np.where(ranks > 1, latency * slower * (ranks - 1) + moved, 0.0)


def gradients(c: Columns, k: Constants, compute: np.ndarray) -> np.ndarray:
    """Exposed seconds of data-parallel traffic per step.

    ZeRO 0 to 2 send gradients (and parameters) once; ZeRO-3 gathers twice and reduces once for
    every microbatch, hidden behind compute as far as that lasts.
    """
    dense, expert = parameters_per_rank(c)
    held = dense + expert
    group = c["dp"] * c["cp"]
    wire = c.get("grad_bytes", np.where(c["mixed"] > 0, 4.0, c["bytes"]))
    weight = np.where(c["mixed"] > 0, 2.0, c["bytes"])
    # an all-reduce is a reduce-scatter and an all-gather: ZeRO gathers parameters instead
    per_step = held * np.where(c["zero"] > 0, (wire + weight) / 2, wire)
    once = collective(c, k, group, per_step, c["tp"]) * k["dp_exposed"]
    each = collective(c, k, group, held * (2 * weight + wire) / 2, c["tp"]) * c["microbatches"]
    streamed = softmax2(compute, each) - compute + 0.1 * k["dp_exposed"] * each
    return np.where(c["zero"] >= 3, streamed, once)


def terms(c: Columns, theta: np.ndarray) -> dict[str, np.ndarray]:
    """Seconds per term (the keys of TERMS) for every row; `theta` are logs of constants.TIME."""
    k = named(TIME, theta)
    tokens = c["microbatch"] * c["seq"] / c["cp"]
    m, p, tp = c["microbatches"], c["pp"], c["tp"]
    forward, scores = layer_forward(c, k)
    again = np.where(c["recompute"] == 2, 1.0, 0.0)
    work = (3 + again) * forward + np.where(c["recompute"] == 1, scores, 0.0)
    for option, gain in (("float8", "float8_gain"), ("compiled", "compiled_gain")):
        work = work / np.where(c.get(option, 0 * m) > 0, k[gain], 1.0)
    issue = (3 + again) * k["layer_launch_s"]
    busy = softmax2(work, issue)
    activation = tokens * c["hidden"] * c["bytes"]
    calls = 4 + 2 * again
    issue_factor = np.where(p > 1, k["pipelined_latency"], 1.0)
    layer = {
        "compute": work,
        "launch": busy - work,
        "tensor": calls * collective(c, k, tp, activation, np.ones_like(tp), issue_factor),
        "context": _context(c, k, activation),
        "experts": _experts(c, k, activation),
    }
    layer["tensor"] *= np.where(c.get("async_tp", 0 * m) > 0, k["async_tp_left"], 1.0)
    per_layer = np.sum(list(layer.values()), axis=0)
    gemm = product(c, k)
    head = 3 * gemm(tokens, c["vocab"] / tp, c["hidden"])
    head = head + 16 * tokens * c["vocab"] / tp * 2 / (c["hbm"] * k["memory_bandwidth"])
    inner, last = c["inner_layers"], c["last_layers"]
    on_last = last * per_layer + head
    heavy_last = (on_last > inner * per_layer) | (p == 1)
    slow_layers = np.where(heavy_last, last, inner)
    out = {name: m * slow_layers * value for name, value in layer.items()}
    out["head"] = np.where(heavy_last, m * head, 0.0)
    share = np.where(c["schedule"] >= SCHEDULES.index("zb-h1"), 1 / 3, 1.0) / c["chunks"]
    # one microbatch passes every stage once; the slowest one's share is counted above
    others = c["layers"] * per_layer + head - np.where(heavy_last, on_last, inner * per_layer)
    out["bubble"] = np.where(p > 1, share * (others + (p - 1) * k["microbatch_s"]), 0.0)
    out["transfer"] = _transfer(c, k, activation)
    out["exposed"] = gradients(c, k, out["compute"])
    out |= _fixed(c, k)
    # a memory prediction is some percent wrong, so the limit is a slope and not a step
    full = 1 / (1 + np.exp(-(c.get("fullness", 0 * m) - 0.95) / 0.03))
    out["allocator"] = k["full_memory_slowdown"] * full * np.sum(list(out.values()), axis=0)
    return out


def _fixed(c: Columns, k: Constants) -> dict[str, np.ndarray]:
    dense, expert = parameters_per_rank(c)
    sharded = np.where(c["zero"] >= 1, c["dp"] * c["cp"], 1.0)
    moved = (dense + expert) * k["optimizer_bytes"] / sharded
    fixed = k["step_s"] + k["rank_step_s"] * c["ranks"] + c["microbatches"] * k["microbatch_s"]
    return {"optimizer": moved / (c["hbm"] * k["memory_bandwidth"]), "fixed": fixed}


def _transfer(c: Columns, k: Constants, activation: np.ndarray) -> np.ndarray:
    """Sends between stages: over the network when a stage fills its node."""
    crosses = c["tp"] * c["dp"] * c["cp"] * 2 > c["per_node"]
    split = np.where(c["sp"] > 0, c["tp"], 1.0)
    link = np.where(crosses, c["net_link"], c["node_link"]) * k["p2p_bandwidth"]
    latency = np.where(crosses, k["p2p_net_latency_s"], k["p2p_latency_s"])
    sends = np.where(c["pp"] > 2, 4.0, 2.0)  # an inner stage sends and receives both ways
    each = latency + activation / split / link + k["p2p_stall_s"] * _slow_share(c, k)
    times = c["microbatches"] * c["chunks"] + c["pp"] - 1
    return np.where(c["pp"] > 1, times * sends * each, 0.0)


def _slow_share(c: Columns, k: Constants) -> np.ndarray:
    """Share of sends in the slow mode: seen on many nodes, and beside unsharded replicas."""
    far = 1 / (1 + (k["p2p_stall_nodes"] / c["nodes"]) ** 4)
    beside = np.where((c["zero"] == 0) & (c["dp"] > 1), k["unsharded_stall"], 0.0)
    return 1 - (1 - far) * (1 - beside)


def _context(c: Columns, k: Constants, activation: np.ndarray) -> np.ndarray:
    """Ring attention's transfers per layer, as far as they exceed the attention they hide behind.

    K and V of the whole sequence are 2 kv/heads of an activation; (c-1)/c of them is sent once
    forward and twice backward, which an all-reduce of 3/2 of them costs too.
    """
    whole = activation * c["cp"] * 2 * c["kv"] / c["heads"] / c["tp"]
    ring = collective(c, k, c["cp"], 1.5 * whole, c["tp"])
    return np.where(c["cp"] > 1, 0.3 * ring, 0.0)


def _experts(c: Columns, k: Constants, activation: np.ndarray) -> np.ndarray:
    """Four all-to-alls of the routed tokens per layer; each costs half an all-reduce."""
    routed = activation * c["top_k"] / np.where(c["sp"] > 0, c["tp"], 1.0)
    return np.where(c["ep"] > 1, 2 * collective(c, k, c["ep"], routed, c["tp"]), 0.0)


def seconds(c: Columns, theta: np.ndarray) -> np.ndarray:
    """Seconds per step for every row."""
    return np.sum(list(terms(c, theta).values()), axis=0)
