"""Checks of lesson 12: failures of a cluster, the best interval, the checkpoint to resume from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from pardemo.check.verdict import demand, verdict

FILES = {"data": "aa", "metadata": "bb"}


@verdict
def hours_between_failures(answer: Callable[[float, int], float]) -> str:
    """`answer(device_years, devices)`: mean hours between failures of the whole cluster."""
    for years, devices in ((5.0, 1), (5.0, 8), (5.78, 16_384)):
        demand(
            answer(years, devices),
            years * 365.25 * 24 / devices,
            f"{devices:,} devices, each failing once in {years} years of 365.25 days: "
            "together they fail that many times as often.",
        )
    return "years for one device are hours for sixteen thousand"


@verdict
def interval_s(answer: Callable[[float, float], float]) -> str:
    """`answer(save_s, mtbf_s)`: Young's interval."""
    for save, mtbf in ((2.0, 100.0), (120.0, 11_135.0), (5.0, 86_400.0)):
        demand(
            answer(save, mtbf),
            math.sqrt(2 * save * mtbf),
            f"a save of {save} s, {mtbf} s between failures: the square root of twice their "
            "product.",
        )
    return "four times cheaper saves are made twice as often"


@verdict
def newest_good(answer: Callable[[Sequence[tuple[int, dict, dict]]], int | None]) -> str:
    """`answer(checkpoints)`: each is (step, expected sums, sums found); the step to resume from."""
    good, bad = FILES, {**FILES, "data": "zz"}
    cases: list[tuple[list[tuple[int, dict, dict]], int]] = [
        ([(10, FILES, good), (20, FILES, good)], 20),
        ([(10, FILES, good), (20, FILES, bad)], 10),
        ([(20, FILES, good), (10, FILES, good), (30, FILES, {"data": "aa"})], 20),
    ]
    for checkpoints, expected in cases:
        demand(
            answer(checkpoints),
            expected,
            f"steps {[step for step, *_ in checkpoints]}: the largest step all of whose sums are "
            "as expected, in whatever order they come.",
        )
    if answer([(10, FILES, bad)]) is not None:
        demand(answer([(10, FILES, bad)]), "None", "No checkpoint is good: there is none to take.")
    return "the newest is not always the best"
