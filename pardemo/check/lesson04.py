"""Checks of lesson 04: bytes of an epoch, the buckets, the sampler that is told the epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import DistributedSampler

from pardemo.check.verdict import NotYet, demand, verdict


@verdict
def epoch_bytes(answer: Callable[[int, int, int, int, int], float]) -> str:
    """`answer(parameters, samples, batch, microbatches, n)`: bytes a rank sends in one epoch."""
    demand(answer(1_000, 640, 64, 1, 1), 0, "One rank has nobody to send to.")
    for case in ((1_000, 640, 64, 1, 2), (1_000, 640, 64, 4, 2), (828_544, 4096, 32, 2, 8)):
        parameters, samples, batch, _, n = case
        expected = samples // batch * 2 * (n - 1) / n * 4 * parameters
        demand(
            answer(*case),
            expected,
            f"{samples // batch} optimiser steps, each sends 2 (n-1)/n * 4 bytes per parameter; "
            "under no_sync microbatches do not matter.",
        )
    return "bytes per epoch follow the number of optimiser steps"


@verdict
def bucket_sizes(answer: Callable[[Sequence[int], int, int], Sequence[int]]) -> str:
    """`answer(sizes, first, cap)`: bytes of each bucket, in order."""
    cases = (
        ([4, 4, 4, 4], 4, 8),
        ([1, 1, 1, 5, 2, 2], 2, 6),
        ([10, 1, 1], 4, 8),
        ([3, 3, 3], 4, 100),
        ([2, 2], 4, 8),
    )
    for sizes, first, cap in cases:
        expected: list[int] = []
        filled = 0
        for size in sizes:
            filled += size
            if filled >= (cap if expected else first):
                expected.append(filled)
                filled = 0
        expected += [filled] if filled else []
        demand(
            list(answer(list(sizes), first, cap)),
            expected,
            f"sizes {sizes}, first {first}, cap {cap}: a bucket closes when it reaches its limit.",
        )
    return "the first message starts early, the others are large"


@verdict
def orders(answer: Callable[[Any, int], Sequence[Sequence[int]]]) -> str:
    """`answer(sampler, epochs)`: one order per epoch, each that of set_epoch(epoch)."""
    found = answer(_sampler(), 3)
    if len(found) != 3:
        raise NotYet(f"{len(found)} epochs", "3 epochs", "One order for each epoch.")
    if list(found[0]) == list(found[1]):
        raise NotYet("the same order twice", "another order in each epoch", "Tell the sampler.")
    for epoch, order in enumerate(found):
        reference = _sampler()
        reference.set_epoch(epoch)
        demand(list(order), list(reference), f"Epoch {epoch} begins with set_epoch({epoch}).")
    return "seed and epoch decide the order, on every rank alike"


def _sampler() -> DistributedSampler[Any]:
    """Rank 1 of 2 over 20 samples; the sampler only asks its data for their number."""
    return DistributedSampler(range(20), num_replicas=2, rank=1, seed=3)  # type: ignore[arg-type]
