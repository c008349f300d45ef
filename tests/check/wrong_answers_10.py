"""Wrong answers to the checks of lesson 10; each must be told "not yet"."""

from __future__ import annotations

import math
from typing import Any


def norm_with_copies(slices: Any, whole: Any) -> float:
    return math.sqrt(
        sum(g * g for part in slices for g in part) + len(slices) * sum(g * g for g in whole)
    )


WRONG: dict[str, list[Any]] = {
    "members": [
        lambda rank, shape, axis: list(range(shape[axis])),
        lambda rank, shape, axis: [rank],
    ],
    "inner_axis": [
        lambda tp, dp, inside, outside: "tp",
        lambda tp, dp, inside, outside: "dp",
    ],
    "global_norm": [
        norm_with_copies,
        lambda slices, whole: math.sqrt(sum(g * g for g in slices[0])),
        lambda slices, whole: sum(abs(g) for part in slices for g in part),
    ],
}
