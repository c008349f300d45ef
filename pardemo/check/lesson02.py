"""Checks of lesson 02: what each rank sends, a ring played chunk by chunk, bus bandwidth."""

from __future__ import annotations

from collections.abc import Callable

from pardemo.check.verdict import NotYet, demand, verdict

_ONCE = ("reduce_scatter", "all_gather")


@verdict
def payloads_sent(answer: Callable[[str, int], float]) -> str:
    """`answer(kind, n)`: payloads each of `n` ranks sends with the bandwidth-optimal algorithm."""
    for ranks in (1, 2, 4, 8):
        for kind in ("all_reduce", *_ONCE):
            times = 2 if kind == "all_reduce" else 1
            demand(
                answer(kind, ranks),
                times * (ranks - 1) / ranks,
                f"{kind} on {ranks} ranks; the payload is the whole tensor.",
            )
    return "an all-reduce is one reduce-scatter and one all-gather"


@verdict
def chunk_to_send(answer: Callable[[int, int, int], int]) -> str:
    """`answer(rank, step, n)`: a reduce-scatter to the left, for rings of 2 to 7 ranks."""
    for size in range(2, 8):
        # held[rank][chunk]: whose contributions this rank's copy of the chunk contains
        held = [[{rank} for _ in range(size)] for rank in range(size)]
        for step in range(size - 1):
            sent = [(rank, answer(rank, step, size)) for rank in range(size)]
            for rank, chunk in sent:
                if chunk not in range(size):
                    raise NotYet(chunk, f"a chunk from 0 to {size - 1}", f"Rank {rank} of {size}.")
            moving = [(rank, chunk, set(held[rank][chunk])) for rank, chunk in sent]
            for rank, chunk, content in moving:
                left = held[(rank - 1) % size][chunk]
                if left & content:
                    hint = f"{size} ranks, step {step}: rank {rank} sends what was added already."
                    raise NotYet(f"chunk {chunk} counted twice", "each part once", hint)
                left |= content
        for chunk in range(size):
            full = [rank for rank in range(size) if len(held[rank][chunk]) == size]
            demand(len(full), 1, f"{size} ranks: on how many of them chunk {chunk} is complete.")
    return "every chunk is complete on exactly one rank, for 2 to 7 ranks"


@verdict
def bus_bandwidth(answer: Callable[[str, float, float, int], float]) -> str:
    """`answer(kind, size_bytes, time_s, n)`: bytes per second that each link carried."""
    for ranks in (2, 4, 8):
        factors = {"all_reduce": 2 * (ranks - 1) / ranks, "broadcast": 1.0}
        for kind in ("all_reduce", "broadcast", *_ONCE):
            factor = factors.get(kind, (ranks - 1) / ranks)
            demand(
                answer(kind, 8e6, 0.002, ranks),
                factor * 8e6 / 0.002,
                f"{kind} of 8 MB in 2 ms on {ranks} ranks.",
            )
    return "the factor is the number of payloads that each link carries"
