"""The statistics against noise with a known answer: seeded, with fixed replicate counts."""

from __future__ import annotations

import numpy as np
import pytest

from pardemo.measure import Timing, statistics
from tests.measure.noise import session

REPLICATES = 300


def coverage(kind: str, **shape: int) -> float:
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(REPLICATES):
        lo, hi = statistics.interval(session(kind, rng, **shape)[0])
        hits += lo <= 1 <= hi
    return hits / REPLICATES


@pytest.mark.parametrize(
    "kind",
    [
        "white", "skewed", "drift", "waves", "weather", "bursts", "memory 0.5", "memory 0.9",
        "lognormal", "heavy", "rounds 0.5",
    ],
)  # fmt: skip
def test_the_95_percent_interval_covers_the_median_on_drifting_and_autocorrelated_noise(kind):
    assert coverage(kind) >= 0.93


def test_the_interval_still_covers_with_eight_rounds_of_few_iterations():
    assert coverage("memory 0.9", rounds=8, iterations=5) >= 0.93
    assert coverage("memory 0.9", rounds=8, iterations=5, variants=1) >= 0.93
    assert coverage("rounds 0.7", rounds=8, iterations=5) >= 0.93
    assert coverage("weather", rounds=8, iterations=5) >= 0.93


def test_a_percentile_bootstrap_would_not_have_covered():
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(REPLICATES):
        drawn = statistics.bootstrap_medians(session("memory 0.9", rng, rounds=8, iterations=5)[0])
        lo, hi = np.quantile(drawn, [0.025, 0.975])
        hits += lo <= 1 <= hi
    assert hits / REPLICATES < 0.90


@pytest.mark.parametrize(
    "kind",
    ["white", "drift", "weather", "memory 0.9", "bursts", "skewed", "lognormal", "heavy"],
)
def test_two_identical_variants_are_called_different_in_at_most_5_percent(kind):
    rng = np.random.default_rng(3)
    different = 0
    for _ in range(400):
        a, b = session(kind, rng)
        _, lo, hi = statistics.paired_ratio(a, b)
        different += not lo <= 1 <= hi
    assert different / 400 <= 0.05


@pytest.mark.parametrize("rounds", [8, 12])
@pytest.mark.parametrize("kind", ["white", "drift", "weather", "memory 0.9"])
def test_a_planted_5_percent_slowdown_under_3_percent_noise_is_found(kind, rounds):
    rng = np.random.default_rng(5)
    found = 0
    for _ in range(200):
        a, b = session(kind, rng, rounds=rounds)
        _, lo, _ = statistics.paired_ratio(1.05 * a, b)
        found += lo > 1
    assert found / 200 >= 0.80


def test_noise_of_whole_cells_hides_a_planted_slowdown_only_from_few_rounds():
    rng = np.random.default_rng(5)
    found = 0
    for _ in range(200):
        level = np.exp(0.03 * rng.normal(size=(2, 12, 1)))
        a, b = level * session("white", rng, rounds=12)
        found += statistics.paired_ratio(1.05 * a, b)[1] > 1
    assert found / 200 >= 0.80


@pytest.mark.parametrize(
    "kind",
    [
        "white",
        pytest.param("weather", marks=pytest.mark.soak),
        pytest.param("lognormal", marks=pytest.mark.soak),
    ],
)
def test_stopping_when_the_interval_is_narrow_spoils_neither_coverage_nor_the_false_alarms(kind):
    rng = np.random.default_rng(9)
    covers = different = 0
    for _ in range(150):
        a, b = session(kind, rng, rounds=24)
        stop = next((n for n in range(8, 24) if _narrow(a[:n]) and _narrow(b[:n])), 24)
        lo, hi = statistics.interval(a[:stop])
        covers += lo <= 1 <= hi
        _, low, high = statistics.paired_ratio(a[:stop], b[:stop])
        different += not low <= 1 <= high
    assert covers / 150 >= 0.93
    assert different / 150 <= 0.05


def _narrow(rounds: np.ndarray) -> bool:
    return Timing.of(rounds).precision <= 0.05


def test_the_ratio_interval_always_holds_the_ratio_of_the_medians():
    rng = np.random.default_rng(0)
    for kind in ("bursts", "drift", "skewed") * 20:
        a, b = session(kind, rng, rounds=8, iterations=3)
        value, lo, hi = statistics.paired_ratio(a, b)
        assert lo <= value <= hi
        assert value == np.median(a) / np.median(b)


def test_the_signed_rank_interval_is_scipys():
    rng = np.random.default_rng(1)
    values = rng.normal(0.3, 1, size=10)
    lo, hi = statistics.centre_interval(values, alpha=0.05)
    from scipy.stats import wilcoxon

    assert wilcoxon(values - lo - 1e-6).pvalue > 0.05 >= wilcoxon(values - lo + 1e-6).pvalue
    assert wilcoxon(values - hi + 1e-6).pvalue > 0.05 >= wilcoxon(values - hi - 1e-6).pvalue


def test_rounds_of_different_lengths_are_resampled_as_rounds():
    rounds = [[1.0, 1.0, 1.0], [2.0], [3.0, 3.0]]
    drawn = statistics.bootstrap_medians(rounds, replicates=200, seed=1)
    assert set(np.unique(drawn)) <= {1.0, 1.5, 2.0, 2.5, 3.0}
    assert statistics.pooled_median(rounds) == 1.5


def test_memory_lowers_the_number_of_effective_rounds_and_nothing_raises_it():
    alternating = [1.0, -1.0] * 8
    smooth = np.sin(np.linspace(0, 3, 16))
    assert statistics.effective_rounds(alternating) == 16
    assert statistics.effective_rounds(smooth) < 4
    assert statistics.effective_rounds([1.0, 1.0, 1.0, 1.0]) == 4


def test_one_round_has_no_interval_and_bad_times_are_refused():
    assert np.isnan(statistics.interval([[1.0, 2.0]])).all()
    with pytest.raises(ValueError, match="round 1 holds no times"):
        statistics.interval([[1.0], []])
    with pytest.raises(ValueError, match="not positive"):
        Timing.of([[1.0, 0.0]])
    with pytest.raises(ValueError, match="no rounds"):
        Timing.of([])
