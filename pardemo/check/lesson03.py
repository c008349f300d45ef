"""Checks of lesson 03: what the root sends, how a batch is dealt, the mean of unequal parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pardemo.check.verdict import demand, verdict


@verdict
def root_sends(answer: Callable[[int, int, int], float]) -> str:
    """`answer(parameters, input_numbers, n)`: bytes the root sends to the other n-1 devices."""
    demand(answer(1_000, 640, 1), 0, "With one device nothing leaves the root.")
    for parameters, numbers, n in ((1_000, 640, 2), (1_000, 640, 4), (11_689_512, 150_528, 8)):
        expected = 4 * (n - 1) * parameters + 4 * numbers * (n - 1) / n
        demand(
            answer(parameters, numbers, n),
            expected,
            f"{parameters:,} parameters and {numbers} input numbers on {n} devices: a whole copy "
            "of the parameters to each other device, and its part of the inputs.",
        )
    return "the parameters, n-1 times, in every step"


@verdict
def part_sizes(answer: Callable[[int, int], Sequence[int]]) -> str:
    """`answer(samples, devices)`: sizes of the parts torch.chunk makes."""
    for samples, devices in ((8, 2), (7, 2), (5, 4), (10, 4), (3, 4)):
        expected = [len(part) for part in torch.arange(samples).chunk(devices)]
        demand(
            list(answer(samples, devices)),
            expected,
            f"{samples} samples on {devices} devices: full parts of ceil(samples / devices).",
        )
    return "five samples on four devices leave one device without work"


@verdict
def combine(answer: Callable[[Sequence[float], Sequence[int]], float]) -> str:
    """`answer(means, sizes)`: the mean over all samples."""
    for means, sizes in (([1.0, 3.0], [4, 4]), ([1.0, 4.0], [2, 1]), ([2.0, 0.5, 9.0], [5, 5, 1])):
        expected = sum(m * s for m, s in zip(means, sizes, strict=True)) / sum(sizes)
        demand(
            answer(means, sizes),
            expected,
            f"means {means} of parts with {sizes} samples: weigh each by its samples.",
        )
    return "weights make parts of any size add up to the batch"
