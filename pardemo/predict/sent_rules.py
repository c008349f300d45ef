"""The closed forms behind `sent_bytes`, one function per strategy.

Every function returns the messages of ONE rank in ONE optimiser step. Payloads are whole arrays
(see `wire.py`). `implementation="gloo"` says that reduce_scatter is carried out as an all-reduce.
Sources: Rajbhandari 2020 (ZeRO), Shoeybi 2019 and Korthikanti 2022 (tensor and sequence parallel),
Narayanan 2021 (pipelines), Liu 2023 (ring attention), Jacobs 2023 (Ulysses), Lepikhin 2020
(experts), and the FSDP2 sources for what is gathered twice.
"""

from __future__ import annotations

from pardemo.predict.sent import Message, message, rule


@rule("single")
def single(ranks: int = 1) -> list[Message]:
    """One process sends nothing."""
    return []


@rule("data_parallel")
def data_parallel(
    ranks: int,
    parameters: float,
    input_bytes: float = 0,
    output_bytes: float = 0,
    bytes_per_element: float = 4,
    rank: int = 0,
    microbatches: int = 1,
    buffers_bytes: float = 0,
) -> list[Message]:
    """nn.DataParallel: the root sends parameters, buffers and inputs; the others send back
    outputs and gradients. `input_bytes` and `output_bytes` are those of the global batch."""
    m, n = microbatches, ranks
    copied = m * (parameters * bytes_per_element + buffers_bytes)
    if rank == 0:
        return [
            message("broadcast", "dp", n, copied, "m (P b + buffers)", m, phase="forward"),
            message("scatter", "dp", n, m * input_bytes, "(n-1)/n * inputs", m, phase="forward"),
        ]
    given, text = m * output_bytes, "outputs / n from a replica"
    back = Message("gather", "dp", m, given, given / n, text, "forward", n)
    return [back, message("reduce", "dp", n, m * parameters * bytes_per_element, "m P b", m)]


@rule("ddp")
def ddp(
    ranks: int,
    parameters: float,
    bytes_per_element: float = 4,
    microbatches: int = 1,
    no_sync: bool = True,
    buckets: int = 1,
    hook_bytes_per_element: float | None = None,
    buffers_bytes: float = 0,
) -> list[Message]:
    """DDP: 2(n-1)/n P b once per step, times m when accumulation forgets `no_sync`.

    `hook_bytes_per_element` is the size on the wire under a compression hook (2 for fp16);
    `buffers_bytes` are broadcast from rank 0 at every synchronised forward; `buckets` sets calls.
    """
    b = hook_bytes_per_element or bytes_per_element
    times = 1 if no_sync else microbatches
    text = "2(n-1)/n P b" + ("" if times == 1 else " m")
    return [
        message("all_reduce", "dp", ranks, times * parameters * b, text, times * buckets),
        message("broadcast", "dp", ranks, times * buffers_bytes, "buffers", times, phase="forward"),
    ]


@rule("zero1")
def zero1(
    ranks: int,
    parameters: float,
    bytes_per_element: float = 4,
    microbatches: int = 1,
    style: str = "scatter_gather",
    buckets: int = 1,
    shards: int | None = None,
    implementation: str = "textbook",
    frozen: float = 0,
) -> list[Message]:
    """ZeRO-1: gradients reduced once per step, updated parameters handed round.

    style="scatter_gather": reduce-scatter + all-gather, 2(n-1)/n P b; "all_reduce_gather": DDP's
    all-reduce, then an all-gather; "all_reduce_broadcast": DDP's all-reduce, then every owner
    broadcasts its tensors, as ZeroRedundancyOptimizer does, in `shards` calls, and the `frozen`
    elements too, which no gradient changed. Each tensor leaves some rank n-1 times, (n-1)/n P b
    per rank in the mean; which rank sends how much, the owners and the backend decide.
    """
    payload = parameters * bytes_per_element
    gather = message(
        "all_gather", "dp", ranks, payload, "(n-1)/n P b", shards or buckets, phase="optimizer"
    )
    if style == "scatter_gather":
        reduced = message(
            "reduce_scatter", "dp", ranks, payload, "(n-1)/n P b", buckets, implementation
        )
        return [reduced, gather]
    reduced = message("all_reduce", "dp", ranks, payload, "2(n-1)/n P b", buckets)
    if style == "all_reduce_gather":
        return [reduced, gather]
    if style == "all_reduce_broadcast":
        size, calls = (parameters + frozen) * bytes_per_element, shards or 1
        sent = size * (ranks - 1) / ranks
        text = "(n-1)/n " + ("(P + frozen) b" if frozen else "P b") + " in the mean"
        return [reduced, Message("broadcast", "dp", calls, size, sent, text, "optimizer", ranks)]
    raise ValueError(f"unknown ZeRO-1 style {style!r}")


@rule("zero2")
def zero2(
    ranks: int,
    parameters: float,
    bytes_per_element: float = 4,
    microbatches: int = 1,
    every_microbatch: bool = True,
    buckets: int = 1,
    shards: int | None = None,
    implementation: str = "textbook",
) -> list[Message]:
    """ZeRO-2: gradients reduce-scattered after every microbatch, parameters gathered once:
    (m+1)(n-1)/n P b. `every_microbatch=False` keeps whole gradients until the last one."""
    times = microbatches if every_microbatch else 1
    p = parameters * bytes_per_element
    return [
        message(
            "reduce_scatter",
            "dp",
            ranks,
            times * p,
            f"{times} (n-1)/n P b",
            times * buckets,
            implementation,
        ),
        message("all_gather", "dp", ranks, p, "(n-1)/n P b", shards or buckets, phase="optimizer"),
    ]


@rule("fsdp", "zero3")
def fsdp(
    ranks: int,
    parameters: float,
    root: float = 0,
    units: int = 1,
    bytes_per_element: float = 4,
    reduce_bytes_per_element: float | None = None,
    microbatches: int = 1,
    reshard_after_forward: bool = True,
    sync_every_microbatch: bool = True,
    regather_root: bool = False,
    implementation: str = "textbook",
    axis: str = "dp",
    frozen: float = 0,
) -> list[Message]:
    """FSDP2 / ZeRO-3: (n-1)/n b [(2P - P_root) gathered + P reduced] per microbatch.

    `units` counts the sharded groups, the root among them; `root` is the root group's own
    parameters, which FSDP2 keeps from forward to backward. reshard_after_forward=False gathers P
    once per microbatch. `frozen` of the `parameters` are gathered but have no gradient to reduce.
    Give padded counts (`predict.padded`) where shapes do not divide.
    """
    m, b = microbatches, bytes_per_element
    again, calls = 0.0, 0
    if reshard_after_forward:
        again = parameters if regather_root else parameters - root
        calls = units if regather_root or not root else max(1, units - 1)
    text = "(n-1)/n b m " + ("P" if regather_root else "(P - P_root)")
    rb = reduce_bytes_per_element or bytes_per_element
    times = m if sync_every_microbatch else 1
    reduced = times * (parameters - frozen) * rb
    return [
        message(
            "all_gather", axis, ranks, m * parameters * b, "(n-1)/n b m P", m * units,
            phase="forward",
        ),
        message("all_gather", axis, ranks, m * again * b, text, m * calls),
        message(
            "reduce_scatter", axis, ranks, reduced, f"{times} (n-1)/n P b", times * units,
            implementation,
        ),
    ]  # fmt: skip


@rule("hsdp")
def hsdp(
    shard: int,
    replicate: int,
    parameters: float,
    units: int = 1,
    root: float = 0,
    bytes_per_element: float = 4,
    reduce_bytes_per_element: float | None = None,
    microbatches: int = 1,
    reshard_after_forward: bool = True,
    sync_every_microbatch: bool = True,
    implementation: str = "textbook",
    ranks: int | None = None,
    frozen: float = 0,
) -> list[Message]:
    """FSDP inside `shard` ranks, an all-reduce of P/shard between `replicate` copies."""
    inner = fsdp(
        shard,
        parameters,
        root,
        units,
        bytes_per_element,
        reduce_bytes_per_element,
        microbatches,
        reshard_after_forward,
        sync_every_microbatch,
        False,
        implementation,
        "shard",
        frozen,
    )
    rb = reduce_bytes_per_element or bytes_per_element
    times = microbatches if sync_every_microbatch else 1
    outer = message(
        "all_reduce",
        "replicate",
        replicate,
        times * (parameters - frozen) * rb / shard,
        "2(r-1)/r P b / shard",
        times * units,
    )
    return [*inner, outer]
