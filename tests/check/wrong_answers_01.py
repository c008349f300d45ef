"""Answers to lesson 01's exercises that must be told "not yet"."""

from __future__ import annotations

from typing import Any

WRONG: dict[str, list[Any]] = {
    "last_counts": [
        lambda n, calls: [calls * (1 + rank) for rank in range(n)],
        lambda n, calls: [calls] * n,
    ],
    "order": [
        lambda rank, n: ("send", "recv"),
        lambda rank, n: ("recv", "send") if rank == 0 else ("send", "recv"),
        lambda rank, n: ("send", "send"),
    ],
    "steps_per_rank": [
        lambda samples, batch: [count // batch for count in samples],
        lambda samples, batch: [max(samples) // batch] * len(samples),
        lambda samples, batch: [sum(samples) // len(samples) // batch] * len(samples),
    ],
}
