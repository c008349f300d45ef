"""Answers to lesson 02's exercises that must be told "not yet"."""

from __future__ import annotations

from typing import Any

WRONG: dict[str, list[Any]] = {
    "payloads_sent": [
        lambda kind, n: 2 * (n - 1) / n,
        lambda kind, n: n - 1,
        lambda kind, n: 2 if kind == "all_reduce" else 1,
    ],
    "chunk_to_send": [
        lambda rank, step, n: (rank - step) % n,
        lambda rank, step, n: rank,
        lambda rank, step, n: rank + step,
    ],
    "bus_bandwidth": [
        lambda kind, size, time, n: size / time * 2 * (n - 1) / n,
        lambda kind, size, time, n: size / time,
        lambda kind, size, time, n: size / time * (n - 1) / n,
    ],
}
