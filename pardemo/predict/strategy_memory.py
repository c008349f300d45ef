"""Memory per rank of a named strategy on any model, from its parameter count.

P parameters of b bytes, n ranks. Single and DDP keep b P + b P + optimiser; ZeRO-1 shards the
optimiser, ZeRO-2 the gradients too, ZeRO-3/FSDP everything, and gathers one unit at a time.
"""

from __future__ import annotations

from pardemo.predict.prediction import Prediction, Term

OPTIMIZER_STATES = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}
REPLICATED = ("single", "data_parallel", "ddp", "context", "ring")
SPLIT = ("tensor", "pipeline", "model_parallel")
LEVEL = {"zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3, "hsdp": 3}


def strategy_memory(
    strategy: str,
    parameters: float,
    ranks: int = 1,
    bytes_per_element: int = 4,
    optimizer: str = "adamw",
    activations_bytes: float = 0,
    buffers_bytes: float = 0,
    in_flight: float = 1,
    share: float | None = None,
    unit_parameters: float = 0,
    shard: int | None = None,
    bucket_view: bool = True,
    master: bool = False,
) -> Prediction:
    """Bytes per rank, term by term.

    `activations_bytes` is ONE microbatch on this rank, `in_flight` how many are alive (min(m, p)
    under 1F1B, m under GPipe). `share` is this rank's part of the parameters where the model is
    split (default 1/ranks). `unit_parameters` is FSDP's largest gathered unit, `shard` HSDP's
    shard size. DDP without `bucket_view` keeps a second copy of the gradients in its buckets.
    `master` adds a 4-byte master copy to the optimiser (mixed precision).
    """
    if optimizer not in OPTIMIZER_STATES:
        raise ValueError(f"optimizer is one of {sorted(OPTIMIZER_STATES)}, got {optimizer!r}")
    if strategy not in (*REPLICATED, *SPLIT, *LEVEL, "expert"):
        raise ValueError(f"no memory formula for {strategy!r}")
    b, level = bytes_per_element, LEVEL.get(strategy, 0)
    part = 1.0
    if strategy in (*SPLIT, "expert"):
        part = 1 / ranks if share is None else share
    n = shard or ranks
    kept = parameters * part
    # moments and the master copy are float32 whenever the parameters are narrower
    wide = max(4, b)
    per_parameter = OPTIMIZER_STATES[optimizer] * wide + (4 if master else 0)
    divide = [n if level >= k else 1 for k in (3, 2, 1)]
    parts = {
        "parameters": (b * kept / divide[0], "b P" + _over(divide[0])),
        "gradients": (b * kept / divide[1], "b P" + _over(divide[1])),
        "optimizer": (per_parameter * kept / divide[2], f"{per_parameter} B P" + _over(divide[2])),
        "activations": (activations_bytes * in_flight, f"{in_flight:g} microbatches in flight"),
        "buffers": (buffers_bytes, "the model's buffers"),
    }
    if strategy in ("ddp", "zero1") and not bucket_view:
        parts["buckets"] = (b * kept, "b P, gradients copied into buckets")
    if level == 3 and unit_parameters:
        parts["gathered"] = (2 * b * unit_parameters, "2 b P_unit, gathered whole")
    terms = tuple(Term(k, text, value, "bytes") for k, (value, text) in parts.items())
    return Prediction(f"memory per rank, {strategy}, {ranks} ranks", terms, "bytes")


def _over(ranks: int) -> str:
    return f" / {ranks}" if ranks > 1 else ""


def peak_bytes(
    parameters_bytes: float,
    gradients_bytes: float,
    optimizer_bytes: float,
    buffers_bytes: float,
    activations_bytes: float,
    gathered_bytes: float = 0,
    gradients_stay: bool = False,
    copied_bytes: float = 0,
) -> float:
    """The most that one rank holds at once in a step, from the sizes of its parts.

    Activations are there before the gradients: backward frees the one as it makes the other, so
    the larger of the two counts, beside what is always there and what is gathered to compute.
    Both count where `gradients_stay`: in DDP's buckets, or from one microbatch to the next.
    `copied_bytes` are of the flat message in which gradients are summed after the backward pass.
    """
    always = parameters_bytes + optimizer_bytes + buffers_bytes + gathered_bytes
    backward = max(gradients_bytes, activations_bytes)
    if gradients_stay:
        backward = gradients_bytes + activations_bytes
    return always + max(backward, gradients_bytes + copied_bytes)
