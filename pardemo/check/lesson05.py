"""Checks of lesson 05: bytes across the cuts, the best cut, who is idle how long."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pardemo.check.verdict import demand, verdict


@verdict
def crossing_bytes(answer: Callable[[int, int, int, int], float]) -> str:
    """`answer(samples, tokens, width, parts)`: bytes over all boundaries in one training step."""
    demand(answer(8, 64, 128, 1), 0, "One part has no boundary.")
    for case in ((8, 64, 128, 2), (16, 64, 128, 4), (4, 1024, 768, 3)):
        samples, tokens, width, parts = case
        demand(
            answer(*case),
            2 * (parts - 1) * samples * tokens * width * 4,
            f"{parts} parts have {parts - 1} boundaries; the activation crosses each forward, its "
            "gradient backward.",
        )
    return "the bytes follow the batch, not the model"


@verdict
def best_cut(answer: Callable[[Sequence[float]], int]) -> str:
    """`answer(costs)`: where the second part starts, so that the larger part is smallest."""
    for costs in ([1, 1, 1, 1], [5, 1, 1, 1], [1, 1, 1, 5], [3, 1, 4, 1, 5], [2, 2], [1, 0, 1]):
        expected = min(range(1, len(costs)), key=lambda k: max(sum(costs[:k]), sum(costs[k:])))
        demand(
            answer(list(costs)),
            expected,
            f"costs {costs}: compare the larger part of every cut, the earliest of equals.",
        )
    return "with more parts the same search needs dynamic programming"


@verdict
def idle_shares(answer: Callable[[Sequence[float]], Sequence[float]]) -> str:
    """`answer(part_seconds)`: the idle share of each device."""
    for seconds in ([1.0, 1.0], [3.0, 1.0], [1.0, 2.0, 5.0]):
        found = list(answer(seconds))
        demand(len(found), len(seconds), f"parts {seconds}: one share for each device.")
        for share, own in zip(found, seconds, strict=True):
            demand(
                round(share, 9),
                round(1 - own / sum(seconds), 9),
                f"parts {seconds}: one device works at a time, so the step takes the sum.",
            )
    return "the device with the smaller part waits longer"
