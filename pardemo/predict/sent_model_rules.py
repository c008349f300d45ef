"""Closed forms of what is sent when the MODEL or the sequence is split, not only the data.

Companion of `sent_rules.py`. A is the bytes of one microbatch's activation [batch, seq, hidden].
"""

from __future__ import annotations

from pardemo.predict.sent import Message, message, rule


@rule("tensor")
def tensor(
    ranks: int,
    layers: int,
    activation_bytes: float,
    microbatches: int = 1,
    pairs_per_layer: int = 2,
    sequence_parallel: bool = False,
    recompute: bool = False,
    input_needs_grad: bool = True,
    extra_forward: int = 0,
    extra_backward: int = 0,
    loss_parallel_bytes: float = 0,
    loss_parallel_calls: int = 3,
    norm_parameters_bytes: float = 0,
    implementation: str = "textbook",
) -> list[Message]:
    """Tensor parallel: 4 all-reduces of A per layer (2 forward, 2 backward), 6 with recompute.

    `pairs_per_layer` column/row pairs each cost one all-reduce forward and one backward; the first
    one's backward is absent when the model's input needs no gradient. With `sequence_parallel`
    each becomes an all-gather plus a reduce-scatter of the same payload. `extra_forward` and
    `extra_backward` count further transfers of A (vocabulary-parallel embedding, gathered head).
    `loss_parallel_bytes` is ONE statistic (max, sum, target logit) of a microbatch's tokens;
    `norm_parameters_bytes` are the replicated gradients all-reduced under sequence parallelism.
    """
    pairs = layers * pairs_per_layer
    forward = pairs * (2 if recompute else 1) + extra_forward
    backward = pairs - (0 if input_needs_grad else 1) + extra_backward
    calls = microbatches * (forward + backward)
    payload = calls * activation_bytes
    loss_calls = loss_parallel_calls * microbatches if loss_parallel_bytes else 0
    loss = message(
        "all_reduce",
        "tp",
        ranks,
        loss_calls * loss_parallel_bytes,
        "2(t-1)/t statistics of the loss",
        loss_calls,
    )
    if not sequence_parallel:
        text = f"2(t-1)/t A m ({forward} forward + {backward} backward)"
        return [message("all_reduce", "tp", ranks, payload, text, calls), loss]
    text = f"(t-1)/t A m ({forward} + {backward})"
    norms = message("all_reduce", "tp", ranks, norm_parameters_bytes, "2(t-1)/t norms' gradients")
    return [
        message("all_gather", "tp", ranks, payload, text, calls),
        message("reduce_scatter", "tp", ranks, payload, text, calls, implementation),
        norms,
        loss,
    ]


@rule("model_parallel")
def model_parallel(
    ranks: int, activation_bytes: float, rank: int = 0, microbatches: int = 1
) -> list[Message]:
    """A chain of devices without microbatches in flight: the bytes are the pipeline's."""
    return pipeline(ranks, activation_bytes, rank=rank, microbatches=microbatches)


def stage_owner(stage: int, ranks: int, chunks: int = 1, v_shape: bool = False) -> int:
    """The rank that holds `stage`: round robin, or there and back for V schedules."""
    if not 0 <= stage < ranks * chunks:
        raise ValueError(f"stage {stage} does not exist among {ranks * chunks} stages")
    if v_shape and (stage // ranks) % 2 == 1:
        return ranks - 1 - stage % ranks
    return stage % ranks


@rule("pipeline")
def pipeline(
    ranks: int,
    activation_bytes: float,
    rank: int = 0,
    microbatches: int = 1,
    chunks: int = 1,
    v_shape: bool = False,
    boundary_bytes: list[float] | None = None,
) -> list[Message]:
    """Pipeline: m A forward and m A backward over every boundary between two ranks.

    An inner rank sends 2 m A (times `chunks` when interleaved), the first and the last half of it.
    `activation_bytes` is ONE microbatch at a boundary; `boundary_bytes` gives one per boundary.
    V schedules (`v_shape`) hold two neighbouring stages on the last rank: nothing crosses there.
    """
    stages = ranks * chunks
    sizes = boundary_bytes or [activation_bytes] * (stages - 1)
    if len(sizes) != stages - 1:
        raise ValueError(f"{stages} stages have {stages - 1} boundaries, got {len(sizes)} sizes")
    payload, calls = 0.0, 0
    for boundary, size in enumerate(sizes):
        left = stage_owner(boundary, ranks, chunks, v_shape)
        right = stage_owner(boundary + 1, ranks, chunks, v_shape)
        if left == right:
            continue
        mine = (left == rank) + (right == rank)
        payload += mine * microbatches * size
        calls += mine * microbatches
    crossings = calls // microbatches if microbatches else 0
    text = f"m A over {crossings} directed boundaries"
    return [message("send", "pp", max(2, ranks), payload, text, calls)]


@rule("context", "ring")
def context(
    ranks: int,
    layers: int,
    kv_bytes: float,
    microbatches: int = 1,
    variant: str = "ring",
    q_bytes: float | None = None,
    backward_factor: float = 2,
    return_gradients: bool = False,
    calls_per_hop: int = 1,
    parameters: float = 0,
    bytes_per_element: float = 4,
) -> list[Message]:
    """Context parallel over c ranks, per layer and microbatch.

    ring: K and V of the whole sequence (`kv_bytes`) rotate c-1 hops forward and, with their
    gradients, `backward_factor` times that backward: (c-1)/c KV (1 + 2). `return_gradients` adds
    the last hop that brings dK and dV home (KV/c). ulysses: all-to-all of q, k, v and the output,
    forward and backward; `q_bytes` is the whole q. Replicated parameters are all-reduced.
    """
    c, times = ranks, layers * microbatches
    out = [message("all_reduce", "cp", c, parameters * bytes_per_element, "2(c-1)/c P b")]
    if variant == "ulysses":
        q = kv_bytes / 2 if q_bytes is None else q_bytes
        local = times * 2 * (2 * q + kv_bytes) / c
        text = "(c-1)/c of local q, k, v, o, forward and backward"
        return [message("all_to_all", "cp", c, local, text, times * 8), *out]
    if variant != "ring":
        raise ValueError(f"context variant is 'ring' or 'ulysses', got {variant!r}")
    if c == 1:
        return []
    payload = times * (1 + backward_factor) * (c - 1) * kv_bytes / c
    hops = times * round((1 + backward_factor) * (c - 1))
    if return_gradients:
        payload += times * kv_bytes / c
        hops += times
    text = f"(c-1)/c KV (1 + {backward_factor:g})" + (" + KV/c" if return_gradients else "")
    return [message("send", "cp", c, payload, text, hops * calls_per_hop), *out]


@rule("expert")
def expert(
    ranks: int,
    layers: int,
    routed_bytes: float,
    microbatches: int = 1,
    counts_bytes: float = 0,
    shared_parameters: float = 0,
    bytes_per_element: float = 4,
    sent_away_bytes: float | None = None,
    shared_calls: int = 1,
) -> list[Message]:
    """Expert parallel: dispatch and combine, forward and backward: 4 (e-1)/e of the routed tokens.

    `routed_bytes` is tokens of this rank x top-k x hidden x b for one layer and microbatch, spread
    evenly; `sent_away_bytes` replaces the even share (e-1)/e by what the router really sent to
    others in one direction. `counts_bytes` is the exchange of counts before each dispatch.
    `shared_parameters` (everything that is not an expert) are all-reduced as in DDP.
    """
    times = layers * microbatches
    tokens = message(
        "all_to_all", "ep", ranks, 4 * times * routed_bytes, "4 (e-1)/e routed tokens", 4 * times
    )
    if sent_away_bytes is not None:
        tokens = Message(
            "all_to_all",
            "ep",
            4 * times,
            4 * times * routed_bytes,
            4.0 * times * sent_away_bytes,
            "4 x tokens routed to others",
        )
    shared = shared_parameters * bytes_per_element
    return [
        tokens,
        message("all_to_all", "ep", ranks, times * counts_bytes, "counts", times),
        message("all_reduce", "ep", ranks, shared, "2(e-1)/e P_shared b", shared_calls),
    ]
