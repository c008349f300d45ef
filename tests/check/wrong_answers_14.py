"""Wrong answers to the checks of lesson 14; each must be told "not yet"."""

from __future__ import annotations

WRONG = {
    "state_bytes": [
        lambda parameters, dp, zero: 18 * parameters,
        lambda parameters, dp, zero: 18 * parameters / (dp if zero else 1),
        lambda parameters, dp, zero: parameters * (2 + 4 + 12 / (dp if zero >= 2 else 1)),
    ],
    "utilization": [
        lambda reported, peak, counts_recompute: reported / peak,
        lambda reported, peak, counts_recompute: (
            reported / peak * (2 / 3 if counts_recompute else 1)
        ),
        lambda reported, peak, counts_recompute: 0.75 * reported / peak,
    ],
    "choose": [
        lambda candidates, capacity, error: min(
            range(len(candidates)), key=lambda i: candidates[i][0]
        ),
        lambda candidates, capacity, error: min(
            (i for i, c in enumerate(candidates) if c[1] <= capacity),
            key=lambda i: candidates[i][0],
            default=-1,
        ),
        lambda candidates, capacity, error: min(
            range(len(candidates)), key=lambda i: candidates[i][1]
        ),
    ],
}
