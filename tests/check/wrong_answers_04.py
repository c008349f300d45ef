"""Wrong answers to the checks of lesson 04; each must be told "not yet"."""

from __future__ import annotations

import random


def _buckets_before(sizes, first, cap):
    """Closes a bucket before the gradient that would reach the limit."""
    found, filled = [], 0
    for size in sizes:
        if filled and filled + size > (cap if found else first):
            found.append(filled)
            filled = 0
        filled += size
    return [*found, filled]


def _without_the_rest(sizes, first, cap):
    found, filled = [], 0
    for size in sizes:
        filled += size
        if filled >= (cap if found else first):
            found.append(filled)
            filled = 0
    return found


def _shuffled(sampler, epochs):
    order = list(sampler)
    return [random.Random(epoch).sample(order, len(order)) for epoch in range(epochs)]


WRONG = {
    "epoch_bytes": [
        lambda p, samples, batch, m, n: samples // batch * m * 2 * (n - 1) / n * 4 * p,
        lambda p, samples, batch, m, n: 2 * (n - 1) / n * 4 * p,
        lambda p, samples, batch, m, n: samples // batch * 4 * p,
    ],
    "bucket_sizes": [_buckets_before, _without_the_rest],
    "orders": [
        lambda sampler, epochs: [list(sampler) for _ in range(epochs)],
        lambda sampler, epochs: [list(sampler)],
        _shuffled,
    ],
}
