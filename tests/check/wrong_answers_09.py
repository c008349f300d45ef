"""Wrong answers to the checks of lesson 09; each must be told "not yet"."""

from __future__ import annotations

import math

WRONG = {
    "ring_bytes": [
        lambda kv_bytes, c: 3 * kv_bytes if c > 1 else 0,
        lambda kv_bytes, c: 2 * (c - 1) / c * kv_bytes,
        lambda kv_bytes, c: 3 * (c - 1) * kv_bytes,
    ],
    "rank_imbalance": [
        lambda choices, ranks: max(choices) * len(choices) / sum(choices),
        lambda choices, ranks: (
            max(sum(choices[r::ranks]) for r in range(ranks)) * ranks / sum(choices)
        ),
    ],
    "merge_two": [
        lambda out_a, lse_a, out_b, lse_b: (out_a + out_b) / 2,
        lambda out_a, lse_a, out_b, lse_b: (lse_a * out_a + lse_b * out_b) / (lse_a + lse_b),
        lambda out_a, lse_a, out_b, lse_b: (
            (math.exp(lse_a) * out_a + math.exp(lse_b) * out_b)
            / (math.exp(lse_a) + math.exp(lse_b))
        ),
    ],
}
