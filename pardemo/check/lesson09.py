"""Checks of lesson 09: bytes of a ring, load of ranks with experts, merging two attentions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from pardemo.check.verdict import NotYet, demand, verdict


@verdict
def ring_bytes(answer: Callable[[int, int], float]) -> str:
    """`answer(kv_bytes, c)`: bytes sent by a rank for one layer, forward and backward."""
    demand(answer(1_000, 1), 0, "One rank has nobody to send to.")
    for kv_bytes, c in ((1_200, 2), (1_200, 4), (8_000_000, 8)):
        demand(
            answer(kv_bytes, c),
            3 * (c - 1) / c * kv_bytes,
            f"{kv_bytes:,} bytes on {c} ranks: {c - 1} hops of {kv_bytes // c:,} bytes forward, "
            "and as many again for each thing that travels backward.",
        )
    return "three turns of the ring: keys and values twice, their gradients once"


@verdict
def rank_imbalance(answer: Callable[[Sequence[int], int], float]) -> str:
    """`answer(choices, ranks)`: largest load of a rank over the mean."""
    cases = (([10, 10, 10, 10], 2), ([30, 0, 10, 0], 2), ([30, 0, 0, 30], 2), ([7, 1, 2, 6], 4))
    for choices, ranks in cases:
        size = len(choices) // ranks
        loads = [sum(choices[r * size : (r + 1) * size]) for r in range(ranks)]
        demand(
            answer(choices, ranks),
            max(loads) * ranks / sum(loads),
            f"choices {choices} on {ranks} ranks: the ranks' loads are {loads}.",
        )
    return "two uneven experts on one rank may even out"


@verdict
def merge_two(answer: Callable[[float, float, float, float], float]) -> str:
    """`answer(out_a, lse_a, out_b, lse_b)`: the attention over both halves."""
    cases = ((17.3, 2.31, 29.5, 3.05), (1.0, 0.0, 3.0, 0.0), (1.0, -1.0, 5.0, 1.0),
             (2.0, 900.0, 4.0, 899.0))  # fmt: skip
    for out_a, lse_a, out_b, lse_b in cases:
        share = 1 / (1 + math.exp(lse_b - lse_a))
        expected, got = share * out_a + (1 - share) * out_b, answer(out_a, lse_a, out_b, lse_b)
        if not abs(float(got) - expected) < 1e-6:
            raise NotYet(got, expected, f"out {out_a} and {out_b} with lse {lse_a} and {lse_b}.")
    return "subtracting the larger log-sum-exp keeps the exponentials finite"
