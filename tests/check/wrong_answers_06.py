"""Wrong answers to the checks of lesson 06; each must be told "not yet"."""

from __future__ import annotations

from typing import Any


def all_forwards_first(p: int, m: int, stage: int) -> list[tuple[str, int]]:
    return [("F", i) for i in range(m)] + [("B", i) for i in range(m)]


def no_warm_up(p: int, m: int, stage: int) -> list[tuple[str, int]]:
    return [(kind, i) for i in range(m) for kind in "FB"]


def one_is_missing(p: int, m: int, stage: int) -> list[tuple[str, int]]:
    return all_forwards_first(p, m, stage)[:-1]


WRONG: dict[str, list[Any]] = {
    "bubble": [
        lambda p, m: (p - 1) / m,
        lambda p, m: p / (m + p),
        lambda p, m: "a lot",
    ],
    "least_microbatches": [
        lambda p, share: round(p / share),
        lambda p, share: (p - 1) / share - (p - 1),
    ],
    "one_forward_one_backward": [all_forwards_first, no_warm_up, one_is_missing],
}
