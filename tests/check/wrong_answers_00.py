"""Wrong answers to the checks of lesson 00; each must be told "not yet"."""

from __future__ import annotations

from statistics import median

WRONG = {
    "sent_bytes": [
        lambda parameters, n: 4 * parameters,
        lambda parameters, n: 2 * (n - 1) * 4 * parameters,
        lambda parameters: 0,
    ],
    "honest_speedup": [
        lambda one, cores, method: one / method,
        lambda one, cores, method: method / min(one, cores),
    ],
    "step_time": [
        lambda times: median(times[0]),
        lambda times: max(median(rank) for rank in times),
        lambda times: median(sum(i) / len(i) for i in zip(*times, strict=True)),
    ],
}
