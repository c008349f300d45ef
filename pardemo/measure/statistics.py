"""Location and intervals of step times whose noise drifts and remembers.

A *round* is the unit of replication: iterations inside one round share the weather of the machine,
so they count as one witness, however many there are. Everything here is plain numpy on
`rounds`: a sequence with one array of times per round.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

MIN_ROUNDS = 6  # with fewer, no signed-rank interval at this confidence exists
CONFIDENCE = 0.95
REPLICATES = 500

Floats = NDArray[np.float64]


def clean(rounds: Sequence[ArrayLike]) -> list[Floats]:
    """The rounds as arrays; ValueError for an empty round, a zero, a negative or a NaN time."""
    arrays = [np.atleast_1d(np.asarray(times, dtype=float)) for times in rounds]
    if not arrays:
        raise ValueError("no rounds: at least one round of times is needed")
    for number, times in enumerate(arrays):
        if times.size == 0:
            raise ValueError(f"round {number} holds no times")
        if not (np.isfinite(times).all() and (times > 0).all()):
            raise ValueError(f"round {number} holds times that are not positive numbers: {times}")
    return arrays


def pooled_median(rounds: Sequence[ArrayLike]) -> float:
    """The median of all times of all rounds together."""
    return float(np.median(np.concatenate(clean(rounds))))


def bootstrap_medians(
    rounds: Sequence[ArrayLike], replicates: int = REPLICATES, seed: int = 0
) -> Floats:
    """Pooled medians of `replicates` resamplings of whole ROUNDS with replacement.

    Each replicate gives every round a weight (how often it was drawn); the weighted median is
    read from one sorted array, so rounds may have different lengths.
    """
    arrays = clean(rounds)
    times = np.concatenate(arrays)
    order = np.argsort(times)
    owner = np.repeat(np.arange(len(arrays)), [len(a) for a in arrays])[order]
    draw = np.random.default_rng(seed).multinomial
    weights = draw(len(arrays), np.full(len(arrays), 1 / len(arrays)), size=replicates)
    below = weights[:, owner].cumsum(axis=1)
    half = below[:, -1:] / 2
    lower, upper = (below >= half).argmax(axis=1), (below > half).argmax(axis=1)
    return (times[order][lower] + times[order][upper]) / 2


def effective_rounds(values: ArrayLike, cap: float = 0.92, caution: float = 4.5) -> float:
    """How many independent rounds these (autocorrelated) round values are worth.

    n (1 - rho) / (1 + rho) with rho the lag-1 autocorrelation, corrected upwards for its
    small-sample bias, (caution + 4 rho) / n, because few rounds hide their own memory
    (Marriott & Pope 1954 give 1 + 4 rho; 4.5 keeps the coverage at eight rounds when successive
    rounds correlate by 0.7). Negative rho is not used to claim more rounds than there are.
    """
    x = np.asarray(values, dtype=float)
    n = len(x)
    deviation = x - x.mean()
    total = float(deviation @ deviation)
    if n < 3 or total == 0:
        return float(n)
    rho = float(deviation[1:] @ deviation[:-1]) / total
    rho = min(max(rho + (caution + 4 * rho) / n, 0.0), cap)
    return n * (1 - rho) / (1 + rho)


def interval(
    rounds: Sequence[ArrayLike], confidence: float = CONFIDENCE, seed: int = 0
) -> tuple[float, float]:
    """(lo, hi) of the pooled median: a bootstrap over rounds, widened until it covers.

    The percentile interval covered 86-92 % at nominal 95 % (8 to 12 rounds of independent noise)
    and 50-85 % on noise with memory. So the bootstrap gives the standard error of the log median
    only; it is multiplied by Student's t with the degrees of freedom of the *effective* rounds and
    by the inflation of their autocorrelation. It is never narrower than the order statistics of the
    rounds' medians, which hold whatever the distribution (a machine with two speeds has no useful
    standard error). One round has no interval: (nan, nan).
    """
    from scipy import special  # not above: every rank that measures imports this module

    arrays = clean(rounds)
    n = len(arrays)
    if n < 2:
        return float("nan"), float("nan")
    error = np.log(bootstrap_medians(arrays, seed=seed)).std(ddof=1) * np.sqrt(n / (n - 1))
    medians = np.sort([np.median(a) for a in arrays])
    effective = effective_rounds([np.log(np.median(a)) for a in arrays])
    freedom = max(effective - 1, min(3, n - 1))
    reach = special.stdtrit(freedom, (1 + confidence) / 2) * error * np.sqrt(n / effective)
    middle = pooled_median(arrays)
    tail = (1 - confidence) * 0.8  # 7 % outside of both: the 2nd to the 7th of eight
    inner = max(1, int((special.bdtr(np.arange(n), n, 0.5) <= tail).sum()))
    lo, hi = min(middle * np.exp(-reach), medians[inner - 1]), medians[n - inner]
    return float(lo), float(max(middle * np.exp(reach), hi))


def paired_ratio(
    top: Sequence[ArrayLike], bottom: Sequence[ArrayLike], alpha: float = 0.04
) -> tuple[float, float, float]:
    """(value, lo, hi) of median(top) / median(bottom), paired by round.

    The interval is Hodges and Lehmann's: the order statistics of the Walsh averages of the
    per-round log ratios, which no single disturbed round can move far; it always holds the ratio of
    the pooled medians. Noise that both variants share cancels within a round, and what does not
    falls on either by the shuffling, so nothing about its distribution is assumed. `alpha` is below
    0.05 because what memory remains across rounds costs about one percent.
    """
    a, b = clean(top), clean(bottom)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} rounds against {len(b)}: a paired ratio needs equal rounds")
    value = pooled_median(a) / pooled_median(b)
    logs = np.array([np.log(np.median(x) / np.median(y)) for x, y in zip(a, b, strict=True)])
    lo, hi = centre_interval(logs, alpha)
    return value, min(float(np.exp(lo)), value), max(float(np.exp(hi)), value)


def unpaired_ratio(
    top: Sequence[ArrayLike], bottom: Sequence[ArrayLike]
) -> tuple[float, float, float]:
    """(value, lo, hi) of median(top) / median(bottom) from two separate sessions.

    The two log intervals are added in quadrature. It cannot know of a machine that was slower on
    the other day: the caller says so.
    """
    value = pooled_median(top) / pooled_median(bottom)
    reaches = []
    for rounds in (top, bottom):
        lo, hi = interval(rounds)
        reaches.append(np.log(hi / lo) / 2)
    reach = float(np.hypot(*reaches))
    return value, float(value * np.exp(-reach)), float(value * np.exp(reach))


def centre_interval(values: Floats, alpha: float = 0.04) -> tuple[float, float]:
    """Distribution-free interval for the centre of symmetric values, one per round (signed-rank).

    Infinite when there are fewer than MIN_ROUNDS values.
    """
    n = len(values)
    i, j = np.triu_indices(n)
    averages = np.sort((values[i] + values[j]) / 2)
    counts = np.zeros(n * (n + 1) // 2 + 1)
    counts[0] = 1.0
    for rank in range(1, n + 1):  # how many subsets of 1..n have each sum
        shifted = counts.copy()
        shifted[rank:] += counts[:-rank]
        counts = shifted
    keep = int((counts.cumsum() / 2.0**n <= alpha / 2).sum())
    if keep == 0:
        return float("-inf"), float("inf")
    return float(averages[keep - 1]), float(averages[-keep])


def typical_weights(points: Floats) -> Floats:
    """Weights, one per row and adding up to 1, under which the rows average to their centre.

    The centre is the spatial (geometric) median, by Weiszfeld's iteration: up to half of the rows
    may be anything, and because it is a mean of rows, what adds up in every row adds up in it.
    """
    scale = float(np.abs(points).max()) or 1.0
    weights = np.full(len(points), 1 / len(points))
    for _ in range(100):
        away = np.linalg.norm(points - weights @ points, axis=1)
        near = 1 / np.maximum(away, 1e-9 * scale)
        weights = near / near.sum()
    return weights


def spread(rounds: Sequence[ArrayLike]) -> tuple[float, float, float]:
    """(p10, p90, IQR / median) of all times of all rounds together."""
    p10, q1, middle, q3, p90 = np.quantile(
        np.concatenate(clean(rounds)), [0.10, 0.25, 0.5, 0.75, 0.90]
    )
    return float(p10), float(p90), float((q3 - q1) / middle)
