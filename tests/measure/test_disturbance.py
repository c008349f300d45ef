"""Time that others take: what it does to a ratio, simulated, and what a ratio then says."""

from __future__ import annotations

import numpy as np
import pytest

from pardemo.measure import Timing
from pardemo.measure.evidence import Look, Spent, Toll, pooled

STEP_S = 0.02
SESSIONS = 200


def steps(rng, ranks, share, burst_s, rounds=8, iterations=8):
    """Steps of some ranks, each on a core of which bursts of `burst_s` take this share."""
    shape = (rounds, iterations, ranks)
    bursts = rng.poisson(share / (burst_s * (1 - share)) * STEP_S, shape)
    lost = np.where(bursts > 0, rng.gamma(np.maximum(bursts, 1), burst_s), 0.0)
    return (STEP_S * np.exp(0.03 * rng.normal(size=shape)) + lost).max(axis=2)


def covered(few, many, share, burst_s, told=None):
    """How often the interval of few over many ranks holds the ratio of an undisturbed machine."""
    rng = np.random.default_rng(11)
    calm = [np.median(steps(rng, n, 0.0, 0.01, rounds=3000)) for n in (few, many)]
    told = share if told is None else told
    hits = 0
    for _ in range(SESSIONS):
        a, b = (
            Timing.of(steps(rng, n, share, burst_s), ranks=n, taken=told, session="s")
            for n in (few, many)
        )
        ratio = a.ratio(b)
        assert not ratio.refused
        hits += ratio.lo <= calm[0] / calm[1] <= ratio.hi
    return hits / SESSIONS


@pytest.mark.parametrize("burst_s", [0.002, 0.01, 0.05])
def test_stolen_time_leaves_the_ratio_of_equally_many_ranks_alone(burst_s):
    assert covered(2, 2, 0.15, burst_s, told=0.0) >= 0.93


@pytest.mark.parametrize(("share", "burst_s"), [(0.05, 0.002), (0.15, 0.002), (0.15, 0.01)])
def test_with_more_ranks_on_one_side_it_bends_the_ratio_and_the_interval_allows_for_it(
    share, burst_s
):
    assert covered(1, 2, share, burst_s, told=0.0) < 0.85
    assert covered(1, 2, share, burst_s) >= 0.93


def timing(taken, ranks=1, scale=1.0, session="s", width=0.02):
    noise = np.exp(width * np.random.default_rng(3).normal(size=(10, 8)))
    load = [f"the hypervisor took {taken:.0%} of the cores' time"] if taken > 0.02 else []
    return Timing.of(
        scale * noise, ranks=ranks, cores=2, load=load, taken=taken, session=session, label="a"
    )


def test_a_little_stolen_time_is_said_and_refuses_nothing():
    cell = timing(0.06)
    assert cell.status == "ok"
    assert "the hypervisor took 6%" in repr(cell)
    assert cell.ratio(timing(0.06)).verdict == "the same"


def test_more_is_contaminated_and_much_more_refuses_every_ratio():
    assert timing(0.14).status == "contaminated"
    assert not timing(0.14).ratio(timing(0.14)).refused
    assert "the hypervisor took 14%" in timing(0.14).ratio(timing(0.14, session="other")).refused
    assert "the hypervisor took 40%" in timing(0.40).ratio(timing(0.0)).refused


def test_a_widened_interval_says_so_and_only_the_side_that_gained_gives_way():
    plain, wide = timing(0.0, 2).ratio(timing(0.0)), timing(0.10, 2).ratio(timing(0.10))
    assert wide.lo == pytest.approx(plain.lo / 1.1)
    assert wide.hi == plain.hi
    assert "one side widened by 10%: others took 10% of the cores' time" in repr(wide)
    assert timing(0.10).ratio(timing(0.10, 2)).hi == pytest.approx(1.1 / plain.lo)


def test_rounds_that_disagree_support_no_ratio():
    rng = np.random.default_rng(0)
    a, b = (Timing.of(np.exp(rng.normal(size=(6, 2))), session="s", label=n) for n in "ab")
    assert a.ratio(b).refused.startswith("the rounds disagree: anywhere between ")


def test_what_the_ranks_used_themselves_is_not_held_against_them():
    before, after = Look(0.0, 100.0, 0.0), Look(10.0, 119.0, 0.0)
    toll = pooled([Spent(9.5, before, after, "here"), Spent(9.5, before, after, "here")])
    assert toll.taken(2, 2) == 0
    assert toll.reasons(2, 2) == []
    elsewhere = pooled([Spent(9.5, before, after, "here"), Spent(9.5, before, after, "there")])
    assert elsewhere.others() == pytest.approx(0.95)
    assert "other work kept 0.95 of 2 cores busy while 2 were needed" in elsewhere.reasons(2, 2)


def test_other_work_on_a_core_that_nobody_needs_is_no_disturbance():
    toll = Toll(elapsed_s=10.0, busy_s=18.0, own_s=9.0)
    assert toll.reasons(1, 2) == []
    assert toll.displaced(2, 2) > 0.4


def test_stolen_time_is_pooled_over_rounds_and_short_looks_say_nothing():
    short = Toll(elapsed_s=0.1, busy_s=0.1, stolen_s=0.05, own_s=0.1)
    assert short.reasons(2, 2) == []
    assert "the hypervisor took 25%" in sum([short] * 10, Toll()).reasons(2, 2)[0]
