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
    pairs, m, a = layers * pairs_per_layer, microbatches, activation_bytes
    repeated = 2 if recompute else 1  # the forward again, inside the backward
    first = 0 if input_needs_grad else 1
    ways = {
        "forward": m * (pairs + extra_forward),
        "backward": m * (pairs * repeated - first + extra_backward),
    }
    calls = loss_parallel_calls * m if loss_parallel_bytes else 0
    text = "2(t-1)/t statistics of the loss"
    loss = message(
        "all_reduce", "tp", ranks, calls * loss_parallel_bytes, text, calls, phase="forward"
    )
    if not sequence_parallel:
        return [
            message("all_reduce", "tp", ranks, n * a, f"{n} x 2(t-1)/t A", n, phase=way)
            for way, n in ways.items()
        ] + [loss]
    split = [
        message(kind, "tp", ranks, n * a, f"{n} x (t-1)/t A", n, implementation, way)
        for way, n in ways.items() for kind in ("all_gather", "reduce_scatter")
    ]  # fmt: skip
    norms = message("all_reduce", "tp", ranks, norm_parameters_bytes, "2(t-1)/t norms' gradients")
    return [*split, norms, loss]


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
    gradient_bytes: list[float] | None = None,
) -> list[Message]:
    """Pipeline: m A forward and m A backward over every boundary between two ranks.

    An inner rank sends 2 m A (times `chunks` when interleaved), the first and the last half of it.
    `activation_bytes` is ONE microbatch at a boundary; `boundary_bytes` gives one per boundary.
    `gradient_bytes` are those that come back, fewer where a mask or numbers of tokens cross.
    V schedules (`v_shape`) hold two neighbouring stages on the last rank: nothing crosses there.
    """
    stages = ranks * chunks
    sizes = boundary_bytes or [activation_bytes] * (stages - 1)
    if len(sizes) != stages - 1:
        raise ValueError(f"{stages} stages have {stages - 1} boundaries, got {len(sizes)} sizes")
    returned = gradient_bytes or sizes
    payload, calls = {"forward": 0.0, "backward": 0.0}, {"forward": 0, "backward": 0}
    for boundary, both in enumerate(zip(sizes, returned, strict=True)):
        left = stage_owner(boundary, ranks, chunks, v_shape)
        right = stage_owner(boundary + 1, ranks, chunks, v_shape)
        if left == right:
            continue
        for way, owner, size in zip(payload, (left, right), both, strict=True):
            if owner == rank:
                payload[way] += microbatches * size
                calls[way] += microbatches
    return [
        message("send", "pp", 2, payload[way], _boundaries(calls[way] // microbatches, way),
                calls[way], phase=way)
        for way in payload
    ]  # fmt: skip


def _boundaries(count: int, way: str) -> str:
    what = {"forward": "A", "backward": "A's gradient"}[way]
    return f"m {what}" if count == 1 else f"m {what} over {count} boundaries"


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
        text = "(c-1)/c of local q, k, v, o"
        return [
            message("all_to_all", "cp", c, local / 2, text, times * 4, phase=way)
            for way in ("forward", "backward")
        ] + out
    if variant != "ring":
        raise ValueError(f"context variant is 'ring' or 'ulysses', got {variant!r}")
    if c == 1:
        return []
    hop = times * kv_bytes / c
    back = backward_factor * (c - 1) + return_gradients
    text = f"{backward_factor:g} (c-1)/c KV" + (" + KV/c" if return_gradients else "")
    ways = [("forward", c - 1, "(c-1)/c KV"), ("backward", back, text)]
    return [
        message("send", "cp", c, n * hop, text, round(times * n) * calls_per_hop, phase=way)
        for way, n, text in ways
    ] + out


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
    away = routed_bytes * (ranks - 1) / ranks if sent_away_bytes is None else sent_away_bytes
    text = "2 (e-1)/e routed tokens" if sent_away_bytes is None else "2 x tokens routed to others"
    tokens = [
        Message("all_to_all", "ep", 2 * times, 2 * times * routed_bytes, 2.0 * times * away, text,
                way, ranks)
        for way in ("forward", "backward")
    ]  # fmt: skip
    shared = shared_parameters * bytes_per_element
    counts = times * counts_bytes
    return [
        *(tokens if ranks > 1 else []),
        message("all_to_all", "ep", ranks, counts, "counts", times, phase="forward"),
        message("all_reduce", "ep", ranks, shared, "2(e-1)/e P_shared b", shared_calls),
    ]
