"""Wrong answers to the checks of lesson 05; each must be told "not yet"."""

from __future__ import annotations


def _middle_of_the_sum(costs):
    """Cuts where half of the cost is reached: the larger part may be larger than need be."""
    total = 0
    for k, cost in enumerate(costs):
        total += cost
        if 2 * total >= sum(costs):
            return max(k, 1)
    return 1


WRONG = {
    "crossing_bytes": [
        lambda samples, tokens, width, parts: (parts - 1) * samples * tokens * width * 4,
        lambda samples, tokens, width, parts: 2 * parts * samples * tokens * width * 4,
        lambda samples, tokens, width, parts: 2 * samples * tokens * width * 4,
    ],
    "best_cut": [
        lambda costs: len(costs) // 2,
        _middle_of_the_sum,
        lambda costs: max(range(1, len(costs)), key=lambda k: sum(costs[:k])),
    ],
    "idle_shares": [
        lambda seconds: [(len(seconds) - 1) / len(seconds)] * len(seconds),
        lambda seconds: [s / sum(seconds) for s in seconds],
    ],
}
