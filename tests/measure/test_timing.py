"""What a Timing and a Ratio say, and when they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from pardemo.measure import Timing
from pardemo.measure.timing import milliseconds
from tests.measure.noise import session


def timing(scale: float = 1.0, kind: str = "white", seed: int = 0, **kwargs) -> Timing:
    times = scale * session(kind, np.random.default_rng(seed))[0]
    return Timing.of(times, **{"cores": 2, "session": "s", "label": "a", **kwargs})


def test_a_timing_is_a_sentence_with_units_rounds_ranks_and_threads():
    said = repr(timing(0.0742, ranks=2, label="ddp"))
    assert said.startswith("ddp: 74.")
    assert "ms (95 % interval " in said
    assert "12 rounds x 8, 2 ranks x 1 thread)" in said


def test_the_raw_rounds_stay_with_the_timing():
    times = session("white", np.random.default_rng(0))[0]
    assert np.array_equal(Timing.of(times).samples, times)


def test_noise_and_contamination_are_labelled_by_iqr_over_median():
    rng = np.random.default_rng(0)
    for width, status in ((0.02, "ok"), (0.12, "noisy"), (0.4, "contaminated")):
        times = np.exp(width * rng.normal(size=(10, 20)))
        assert Timing.of(times).status == status


def test_more_ranks_than_devices_is_oversubscribed_even_when_noisy():
    cell = timing(ranks=4, threads=1, kind="bursts")
    assert cell.status == "oversubscribed"
    assert "4 ranks x threads on 2 devices: no speed-up is claimed from it" in cell.warnings


def test_nothing_is_deleted_by_value():
    times = np.ones((8, 5))
    times[3, 2] = 100.0
    cell = Timing.of(times)
    assert max(max(r) for r in cell.samples) == 100.0
    assert cell.median_s == 1.0


def test_interleaved_timings_are_paired_and_others_are_not():
    a, b = session("weather", np.random.default_rng(1))
    first = Timing.of(a * 1.05, session="one", label="slow")
    second = Timing.of(b, session="one", label="fast")
    stranger = Timing.of(b, session="two", label="old")
    paired, unpaired = first.ratio(second), first.ratio(stranger)
    assert paired.paired
    assert paired.verdict == "slower"
    assert "slow takes 1.05x the time of fast" in repr(paired)
    assert not unpaired.paired
    assert unpaired.hi - unpaired.lo > 2 * (paired.hi - paired.lo)
    assert unpaired.verdict == "cannot tell"


def test_the_same_needs_a_narrow_interval():
    a, b = session("white", np.random.default_rng(2))
    same = Timing.of(a, session="x").ratio(Timing.of(b, session="x"))
    assert same.verdict == "the same"
    wide = session("white", np.random.default_rng(2), rounds=8, iterations=3) ** 3.5
    unsure = Timing.of(wide[0], session="x").ratio(Timing.of(wide[1], session="x"))
    assert unsure.verdict == "cannot tell"


@pytest.mark.parametrize(
    ("kwargs", "why"),
    [
        ({"ranks": 4}, "was oversubscribed"),
        ({"load": ["other work kept 1.2 of 2 cores busy"]}, "other work kept 1.2 of 2 cores busy"),
    ],
)
def test_a_ratio_is_refused_in_words(kwargs, why):
    ratio = timing(label="ddp", **kwargs).ratio(timing(label="single"))
    assert not ratio.different
    assert ratio.verdict == "cannot tell"
    assert repr(ratio).startswith("no ratio of ddp to single: ")
    assert why in ratio.refused


def test_too_few_rounds_support_no_ratio():
    few = Timing.of(np.ones((3, 4)), session="x", label="a")
    ratio = few.ratio(few)
    assert "only 3 rounds, and 6 are needed" in ratio.refused
    assert Timing.of([[1.0, 1.1]]).ratio(few).refused


def test_the_faster_one_reports_its_speedup():
    a, b = session("white", np.random.default_rng(4))
    ratio = Timing.of(0.5 * a, session="x", label="two").ratio(
        Timing.of(b, session="x", label="one")
    )
    assert ratio.verdict == "faster"
    assert "two is as fast" not in repr(ratio)
    assert f"two is {ratio.speedup:.2f}x as fast as one" in repr(ratio)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0742, "74.2 ms"), (1.5, "1500 ms"), (0.00123, "1.23 ms"), (2e-5, "0.02 ms"), (0, "0 ms")],
)
def test_milliseconds_keep_three_digits(seconds, text):
    assert milliseconds(seconds) == text
