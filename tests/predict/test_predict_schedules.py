"""The simulator against the closed forms, by hand-counted cases, and against orders that lock."""

from __future__ import annotations

import itertools

import pytest

from pardemo.predict import ScheduleError, bubble_formula, schedule, simulate
from pardemo.predict.orders import NAMES, Op

PS, MS = (1, 2, 3, 4, 8), (1, 2, 3, 4, 7, 8, 16)


@pytest.mark.parametrize(("p", "m"), list(itertools.product(PS, MS)))
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_equal_stages_wait_p_minus_1_of_m_plus_p_minus_1(name, p, m):
    assert schedule(name, p, m).bubble == pytest.approx(bubble_formula(name, p, m))


@pytest.mark.parametrize(
    ("p", "groups", "v"), list(itertools.product((2, 4, 8), (1, 2, 4), (1, 2, 3)))
)
def test_interleaving_divides_the_overhead_by_the_chunks(p, groups, v):
    m = p * groups
    s = schedule("interleaved", p, m, chunks=v)
    assert s.overhead == pytest.approx((p - 1) / (v * m))
    assert s.bubble == pytest.approx(bubble_formula("interleaved", p, m, v))


@pytest.mark.parametrize(("p", "m"), [(2, 2), (2, 8), (4, 4), (4, 8), (8, 16)])
def test_zero_bubble_h1_waits_a_third_of_1f1b(p, m):
    s = schedule("zb-h1", p, m, forward=1, backward=2)
    assert s.bubble == pytest.approx((p - 1) / (3 * m + p - 1))
    assert max(s.peak_activations) <= p


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (4, 16), (8, 16)])
def test_zero_bubble_v_waits_less_than_h1_in_the_same_memory(p, m):
    v, h1 = schedule("zbv", p, m), schedule("zb-h1", p, m)
    assert v.bubble < h1.bubble
    assert max(v.peak_activations) <= p


def test_gpipe_keeps_all_microbatches_and_1f1b_only_p_of_them():
    assert schedule("gpipe", 4, 16).peak_activations == (16, 16, 16, 16)
    assert schedule("1f1b", 4, 16).peak_activations == (4, 3, 2, 1)


def test_the_slowest_stage_sets_the_pace():
    s = schedule("1f1b", 2, 4, forward=[1, 3], backward=[2, 6])
    assert s.time == 1 + 4 * 9 + 2
    assert s.busy == (12, 36)


def test_a_transfer_delays_every_crossing():
    assert schedule("gpipe", 2, 1, transfer=0.5).time == 6 + 2 * 0.5
    assert schedule("gpipe", 1, 4, transfer=9).time == 12


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_fewer_microbatches_than_stages_still_run_every_operation_once(name, m):
    s = schedule(name, 4, m, chunks=2 if name == "interleaved" else 1)
    stages = 4 * s.chunks
    kinds = "FBW" if name.startswith("zb") else "FB"
    done = sorted((x.kind, x.stage, x.microbatch) for x in s.spans)
    assert done == sorted(itertools.product(kinds, range(stages), range(m)))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_starts_before_what_it_needs_and_ranks_do_one_thing_at_a_time(name):
    s = schedule(name, 4, 8, transfer=0.25, chunks=2 if name == "interleaved" else 1)
    end = {(x.kind, x.stage, x.microbatch): x for x in s.spans}
    last = 4 * s.chunks - 1
    for x in s.spans:
        before = {"F": ("F", x.stage - 1), "B": ("B", x.stage + 1), "W": ("B", x.stage)}[x.kind]
        if 0 <= before[1] <= last:
            need = end[before[0], before[1], x.microbatch]
            assert x.start >= need.end + (0.25 if need.rank != x.rank else 0) - 1e-9
    for rank in range(4):
        mine = s.on(rank)
        assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(mine))


def test_an_order_that_waits_for_itself_is_a_deadlock():
    orders = [[Op("B", 0, 0), Op("F", 0, 0)], [Op("F", 1, 0), Op("B", 1, 0)]]
    cost = {"F": [1.0, 1.0], "B": [2.0, 2.0], "W": [0.0, 0.0]}
    with pytest.raises(ScheduleError, match="deadlock: rank 0 waits for B0@stage0"):
        simulate(orders, [0, 1], cost, 0.0, 1)


def test_a_forgotten_or_repeated_operation_is_refused():
    cost = {"F": [1.0], "B": [1.0], "W": [0.0]}
    with pytest.raises(ScheduleError, match="B0@stage0 is missing"):
        simulate([[Op("F", 0, 0)]], [0], cost, 0.0, 1)
    with pytest.raises(ScheduleError, match="listed twice"):
        simulate([[Op("F", 0, 0), Op("F", 0, 0)]], [0], cost, 0.0, 1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"name": "2f2b", "ranks": 2, "microbatches": 2}, "unknown schedule"),
        ({"name": "1f1b", "ranks": 0, "microbatches": 2}, "at least 1"),
        ({"name": "1f1b", "ranks": 2, "microbatches": 2, "chunks": 2}, "one chunk"),
        ({"name": "1f1b", "ranks": 2, "microbatches": 2, "forward": [1.0]}, "need 2 times"),
        ({"name": "1f1b", "ranks": 2, "microbatches": 2, "backward": -1.0}, "negative"),
    ],
)
def test_impossible_requests_are_refused_in_words(bad, message):
    with pytest.raises(ScheduleError, match=message):
        schedule(**bad)


def test_the_chart_has_one_line_per_rank():
    chart = schedule("1f1b", 3, 4).chart().splitlines()
    assert [line[:6] for line in chart] == ["rank 0", "rank 1", "rank 2"]
    assert chart[0].count("F") == 4
    assert chart[0].count("B") == 8


def test_a_published_pipeline_follows_the_bubble_within_3_percent():
    # github.com/pytorch/examples/issues/749: two stages, seconds at 1, 2, 4, 8 microbatches
    measured = {1: 16.45, 2: 12.33, 4: 10.16, 8: 9.08}
    for m, seconds in measured.items():
        ticks = schedule("gpipe", 2, m, 1 / m, 2 / m).time / schedule("gpipe", 2, 1).time
        assert ticks * measured[1] == pytest.approx(seconds, rel=0.03)
