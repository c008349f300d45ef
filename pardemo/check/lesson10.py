"""Checks of lesson 10: who is in my group, which axis goes inside, the norm of sliced gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from pardemo.check.verdict import demand, verdict


@verdict
def members(answer: Callable[[int, tuple[int, ...], int], Sequence[int]]) -> str:
    """`answer(rank, shape, axis)`: ranks of the group of `rank` along `axis`, in order."""
    for shape in ((2, 4), (2, 2, 2), (3, 1, 2)):
        grid = np.arange(math.prod(shape)).reshape(shape)
        for rank in (0, grid.size - 1, grid.size // 2):
            place = [int(i[0]) for i in np.where(grid == rank)]
            for axis in range(len(shape)):
                line = tuple(slice(None) if i == axis else p for i, p in enumerate(place))
                demand(
                    [int(r) for r in answer(rank, shape, axis)],
                    grid[line].tolist(),
                    f"Mesh {shape}, rank {rank} at {tuple(place)}, axis {axis}: only this "
                    "coordinate changes; the last axis counts fastest.",
                )
    return "neighbours in number share the last axis: so the last axis stays inside a machine"


@verdict
def inner_axis(answer: Callable[[float, float, float, float], str]) -> str:
    """`answer(tp_bytes, dp_bytes, inside, outside)`: "tp" or "dp", whichever should be inside."""
    cases = ((1e9, 1e6, 1e11, 1e9), (1e6, 1e9, 1e11, 1e9), (3e8, 2e8, 1e10, 1e8))
    for tp, dp, inside, outside in cases:
        expected = "tp" if tp / inside + dp / outside <= dp / inside + tp / outside else "dp"
        demand(
            answer(tp, dp, inside, outside),
            expected,
            f"{tp:.0e} bytes on tp and {dp:.0e} on dp, links of {inside:.0e} and {outside:.0e} "
            "bytes/s: add up the seconds of both orders.",
        )
    return "the axis that sends more belongs on the faster link; nothing else matters here"


@verdict
def global_norm(answer: Callable[[Sequence[Sequence[float]], Sequence[float]], float]) -> str:
    """`answer(slices, whole)`: norm of gradients of which each rank has a slice, and whole ones."""
    for slices, whole in (
        ([[3.0], [4.0]], []),
        ([[1.0, 2.0], [2.0, 4.0]], [5.0]),
        ([[0.0]], [2.0]),
    ):
        square = sum(g * g for part in slices for g in part) + sum(g * g for g in whole)
        demand(
            answer(slices, whole),
            math.sqrt(square),
            f"slices {slices} on {len(slices)} ranks, and {whole} held by every rank: squares of "
            "slices add up over ranks, those of whole gradients count once.",
        )
    return "with the norm of its own part each rank would scale by another factor"
