"""Checks of lesson 00: bytes of a step, the honest baseline, the time of a group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from pardemo.check.verdict import demand, verdict


@verdict
def sent_bytes(answer: Callable[[int, int], float]) -> str:
    """`answer(parameters, n)`: bytes each of `n` ranks sends in one step of ddp, fp32."""
    demand(answer(1_000, 1), 0, "One rank has nobody to send to.")
    for parameters, ranks in ((1_000, 2), (1_000, 4), (124_439_808, 8)):
        expected = 2 * (ranks - 1) / ranks * 4 * parameters
        demand(
            answer(parameters, ranks),
            expected,
            f"For {parameters:,} parameters on {ranks} ranks: 2 (n-1)/n times 4 bytes each.",
        )
    return f"on 8 ranks, gpt2 sends {answer(124_439_808, 8) / 1e6:.0f} MB per rank and step"


@verdict
def honest_speedup(answer: Callable[[float, float, float], float]) -> str:
    """`answer(one_thread_s, all_cores_s, method_s)`: speed-up over the best single process."""
    demand(answer(1.0, 0.5, 0.8), 0.625, "One process on all cores took 0.5 s; the method 0.8 s.")
    demand(answer(1.0, 1.2, 0.5), 2.0, "Here threads do not help: one thread is the best.")
    return "a method can be 1.25x as fast as one thread and still lose to all cores"


@verdict
def step_time(answer: Callable[[Sequence[Sequence[float]]], float]) -> str:
    """`answer(times)`: median over iterations of the maximum over ranks."""
    for times in ([[1, 2, 3], [3, 2, 1]], [[1, 9, 1], [9, 1, 9]], [[4, 4], [1, 2], [9, 5]]):
        expected = median(max(iteration) for iteration in zip(*times, strict=True))
        demand(
            answer(times),
            expected,
            f"times = {times}: the group's iteration ends with its slowest rank.",
        )
    return "first the maximum over ranks, then the median over iterations"
