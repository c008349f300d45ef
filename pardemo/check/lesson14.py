"""Checks of lesson 14: memory of a plan, an honest utilisation, a choice that allows for error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pardemo.check.verdict import demand, verdict

# time of a step in s, predicted memory in GB: what a planner hands to the one who decides
Candidate = tuple[float, float]


@verdict
def state_bytes(answer: Callable[[int, int, int], float]) -> str:
    """`answer(parameters, dp, zero)`: bytes of weights 2, gradients 4, optimiser 12 per rank."""
    for parameters, dp in ((1_000_000, 1), (8_000_000_000, 8), (70_000_000_000, 64)):
        for zero, (weights, gradients, optimizer) in enumerate(
            ((1, 1, 1), (1, 1, dp), (1, dp, dp), (dp, dp, dp))
        ):
            expected = parameters * (2 / weights + 4 / gradients + 12 / optimizer)
            demand(
                answer(parameters, dp, zero),
                expected,
                f"{parameters:,} parameters, dp {dp}, ZeRO-{zero}: stage 1 shards the optimiser, "
                "stage 2 also the gradients, stage 3 also the weights.",
            )
    return f"8 B parameters on 8 ranks, ZeRO-3: {answer(8_000_000_000, 8, 3) / 1e9:.0f} GB"


@verdict
def utilization(answer: Callable[[float, float, bool], float]) -> str:
    """`answer(reported, peak, counts_recompute)`: model FLOPs over the peak, recompute left out."""
    for reported, peak in ((140.0, 312.0), (400.0, 989.0)):
        demand(answer(reported, peak, False), reported / peak, "Nothing to take out here.")
        demand(
            answer(reported, peak, True),
            0.75 * reported / peak,
            "Forward 1, recomputed forward 1, backward 2: what share of the four is the model's?",
        )
    return (
        f"140 TFLOP/s with recomputation on an A100 is {answer(140.0, 312.0, True):.1%}, not 45 %"
    )


@verdict
def choose(answer: Callable[[Sequence[Candidate], float, float], int]) -> str:
    """`answer(candidates, capacity, error)`: index of the fastest that fits even with the error."""
    candidates = [(5.0, 79.0), (5.5, 70.0), (6.0, 40.0), (4.9, 95.0)]
    cases: list[tuple[list[Candidate], float, float, int]] = [
        (candidates, 80.0, 0.0, 0),
        (candidates, 80.0, 0.1, 1),
        (candidates, 80.0, 0.25, 2),
        (candidates, 120.0, 0.25, 3),
        (candidates, 40.0, 0.25, -1),
    ]
    for given, capacity, error, expected in cases:
        demand(
            answer(given, capacity, error),
            expected,
            f"{given} on {capacity:g} GB, memory off by up to {error:.0%}: the memory times "
            "(1 + error) must fit; of those that fit, the fastest; -1 when none does.",
        )
    return "a layout that fits only if the prediction is exact is not a plan"
