"""Memory per rank: parameters, gradients, optimiser, activations, buffers.

`memory(model, layout)` for a transformer under any layout; `memory("fsdp", parameters=..., ...)`
for a strategy on any model. Activations follow Korthikanti 2022 table 2, generalised to grouped
heads, gated MLPs and fused attention; the states follow Rajbhandari 2020 section 3.
"""

from __future__ import annotations

import numpy as np

from pardemo.predict.columns import Columns, columns, in_flight, parameters_per_rank
from pardemo.predict.constants import MEMORY, vector
from pardemo.predict.model import Layout, Transformer
from pardemo.predict.prediction import Prediction, Term

STATE_BYTES = {"fp32": (4, 4, 8), "mixed": (2, 4, 12), "bf16": (2, 2, 4)}
# the spread of published peaks around this formula: 8 % median, 25 % at the 90th percentile
RESIDUAL = (0.80, 1.25)


def states(c: Columns, stage: str = "first") -> dict[str, np.ndarray]:
    """Bytes of parameters, gradients and optimiser on an end stage, after ZeRO sharding."""
    dense, expert = parameters_per_rank(c, stage)
    copies = np.maximum(c["dp"] * c["cp"], 1)
    expert_copies = np.maximum(copies / c["ep"], 1)
    mixed = c["mixed"] > 0
    b = c["bytes"]
    each = {
        "parameters": (np.where(mixed, 2.0, b), 3),
        "gradients": (np.where(mixed, 4.0, b), 2),
        "optimizer": (np.where(mixed, 12.0, 2 * np.maximum(b, 4)), 1),
    }
    out = {}
    for name, (size, level) in each.items():
        on = c["zero"] >= level
        shared = dense / np.where(on, copies, 1) + expert / np.where(on, expert_copies, 1)
        out[name] = size * shared
    return out


def activations_per_layer(c: Columns) -> np.ndarray:
    """Bytes kept for backward by one layer and one microbatch on one rank.

    Without recomputation (2-byte elements): 8 h + 4 h kv/heads ... + 4 f or 6 f (gated), the norms
    4 h; plus 5 heads s per token where attention is not fused. `full` keeps the layer's input.
    """
    tokens = c["microbatch"] * c["seq"] / c["cp"]
    h, f, b = c["hidden"], c["ffn"] * c["top_k"], c["bytes"]
    outside = np.where(c["sp"] > 0, c["tp"], 1.0)
    replicated = b * h * (2 + 2) / outside  # inputs of the two blocks and of the two norms
    attention = b * h * (2 + 2 * c["kv"] / c["heads"]) / c["tp"]
    mlp = b * f * c["matrices"] / c["tp"]
    scores = np.where(c["flash"] > 0, 0.0, 2.5 * b * c["heads"] * c["seq"] / c["tp"])
    scores = np.where(c["recompute"] == 1, 0.0, scores)
    kept = tokens * (replicated + attention + mlp + scores)
    return np.where(c["recompute"] == 2, tokens * b * h / outside, kept)


def activations(c: Columns, stage: str = "first") -> np.ndarray:
    """Bytes of activations at the peak on an end stage, recomputed layer and logits included."""
    per_layer = activations_per_layer(c)
    first = stage == "first"
    layers = c["first_layers"] if first else c["last_layers"]
    alive = in_flight(c) if first else np.where(c["pp"] == 1, 1.0, np.minimum(in_flight(c), 1.0))
    working = np.where(
        c["recompute"] == 2, activations_per_layer(c | {"recompute": 0 * layers}), 0.0
    )
    tokens = c["microbatch"] * c["seq"] / c["cp"]
    has_head = np.where(c["pp"] == 1, 1.0, 0.0) if first else 1.0
    # logits in the compute type, in float32 for the loss, and the gradient of the logits
    logits = has_head * tokens * c["vocab"] / c["tp"] * (2 * c["bytes"] + 4)
    return layers * alive * per_layer + working + logits


def buffers(c: Columns) -> np.ndarray:
    """Bytes of communication buffers: gathered layers under ZeRO-3, gradient buckets else."""
    gathered = 2 * c["layer_p"] / c["tp"] / c["ep"] * np.where(c["mixed"] > 0, 2.0, c["bytes"])
    sent = np.where(c["pp"] > 1, 4.0, 0.0) * c["microbatch"] * c["seq"] * c["hidden"] * c["bytes"]
    return np.where(c["zero"] >= 3, gathered, 0.0) + sent / c["cp"]


def total(c: Columns) -> np.ndarray:
    """Peak bytes of the fullest end stage; infinite where a stage would hold nothing."""
    out = np.zeros(len(c["hidden"]))
    for stage in ("first", "last"):
        out = np.maximum(out, sum(states(c, stage).values()) + activations(c, stage))
    return np.where(c["empty_stages"] > 0, np.inf, out + buffers(c))


def fitted_total(c: Columns, theta: np.ndarray | None = None) -> np.ndarray:
    """Peak bytes with the constants of `constants.MEMORY` (logs), for calibration on readings.

    Activations are those of the fullest stage under the first one's microbatches in flight.
    """
    t = np.exp(vector(MEMORY) if theta is None else theta)
    state, optimizer, hidden, ffn, replicated, logits, fixed = t
    tokens = c["microbatch"] * c["seq"] / c["cp"]
    best = np.zeros(len(c["hidden"]))
    copies = np.where(c["zero"] >= 1, c["dp"] * c["cp"], 1.0)
    for stage in ("first", "last"):
        first = stage == "first"
        layers = c["inner_layers"] if first else c["last_layers"]
        alive = in_flight(c) if first else np.ones_like(layers)
        head = np.where(c["pp"] == 1, 1.0, 0.0) if first else 1.0
        p = sum(parameters_per_rank(c, stage))
        whole = state * p / np.where(c["zero"] >= 3, copies, 1.0)
        sharded = hidden * c["hidden"] + ffn * c["ffn"] * c["top_k"]
        # sequence parallelism gathers one layer's input at a time, else every layer keeps it whole
        layer = sharded / c["tp"] + np.where(c["sp"] > 0, 0.0, replicated * c["hidden"])
        inputs = 2 * c["hidden"] / np.where(c["sp"] > 0, c["tp"], 1.0)
        layer = np.where(c["recompute"] == 2, inputs, layer)
        kept = tokens * (layers * alive * layer + c["sp"] * replicated * c["hidden"])
        scores = head * tokens * c["vocab"] / c["tp"] * logits
        best = np.maximum(best, whole + optimizer * p / copies + kept + scores)
    return best + fixed


def memory(what: Transformer | str, layout: Layout | None = None, **knobs: object) -> Prediction:
    """Peak memory of one rank: of a Transformer under a Layout, or of a named strategy.

    memory(model, layout); memory("fsdp", parameters=P, ranks=4, ...), see `strategy_memory`.
    ValueError when the layout leaves a stage without parameters.
    """
    if isinstance(what, str):
        from pardemo.predict.strategy_memory import strategy_memory

        return strategy_memory(what, **knobs)  # type: ignore[arg-type]
    layout = layout or Layout()
    c = columns(what, [layout])
    if c["empty_stages"][0] > 0:
        raise ValueError(f"{layout.pp} stages for {what.layers} layers: a stage would be empty")
    best: dict[str, float] = {}
    for stage in ("first", "last"):
        found = {k: float(v[0]) for k, v in states(c, stage).items()}
        found["activations"] = float(activations(c, stage)[0])
        if sum(found.values()) > sum(best.values()):
            best = found
    best["buffers"] = float(buffers(c)[0])
    return _prediction(what, layout, best)


def _prediction(model: Transformer, layout: Layout, parts: dict[str, float]) -> Prediction:
    sizes = STATE_BYTES["mixed"] if layout.mixed else (layout.bytes_per_element,) * 3
    z = layout.zero
    text = {
        "parameters": f"{sizes[0]} B x P/(tp pp{' dp' if z >= 3 else ''})",
        "gradients": f"{sizes[1]} B x P/(tp pp{' dp' if z >= 2 else ''})",
        "optimizer": f"{sizes[2] if layout.mixed else 2 * max(4, sizes[2])} B x P/(tp pp"
        f"{' dp' if z >= 1 else ''})",
        "activations": "tokens x layers x in flight x bytes per layer, and the logits",
        "buffers": "gathered layers (zero 3), stage inputs and outputs",
    }
    terms = tuple(Term(k, text[k], v, "bytes") for k, v in parts.items())
    value = sum(parts.values())
    what = f"peak memory per rank, {model.name}, {layout!r}"
    return Prediction(what, terms, "bytes", RESIDUAL[0] * value, RESIDUAL[1] * value)
