"""compare() on two real ranks: what is kept, in which order, and why it stops. No clocks."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from pardemo.measure import Case, compare, inside
from pardemo.measure.rounds import taking


def spin(mesh):
    def step():
        total = torch.ones(64).sum()
        if mesh is not None:
            dist.all_reduce(total, group=mesh.get_group())  # moves 2(n-1)/n * 4 bytes

    return step


@pytest.fixture(scope="module")
def found(ranks2):
    seen = []
    cases = {
        "one": Case(spin, ranks=1),
        "all cores": Case(spin, ranks=1, threads=2, label="one process"),
        "two": Case(spin, ranks=2),
    }
    result = compare(
        cases, ranks=ranks2, rounds=6, max_rounds=7, budget_s=2, iterations=4, warmup=3,
        progress=lambda *said: seen.append(said),
    )  # fmt: skip
    return result, seen


def test_every_round_runs_every_variant_once_in_shuffled_order(found):
    result, _ = found
    frame = result.samples.frame()
    measured = frame[frame.phase == "measure"]
    orders = set()
    for _, part in measured.groupby("round"):
        order = part.drop_duplicates("variant").sort_values("order").variant.tolist()
        assert sorted(order) == ["all cores", "one", "two"]
        orders.add(tuple(order))
    assert len(orders) > 1


def test_the_raw_table_has_one_row_per_rank_and_iteration(found):
    result, _ = found
    frame = result.samples.frame()
    measured = frame[(frame.phase == "measure") & (frame.variant == "two")]
    rounds = result["two"].rounds
    assert len(measured) == rounds * 4 * 2
    assert set(measured["rank"]) == {0, 1}
    assert set(frame[frame.variant == "one"]["rank"]) == {0}


def test_warm_up_is_kept_and_flagged_and_not_in_the_timing(found):
    result, _ = found
    frame = result.samples.frame()
    warm = frame[(frame.phase == "warmup") & (frame.variant == "one")]
    assert len(warm[warm["round"] == -1]) == 3
    assert len(warm[warm["round"] == 0]) == 2
    assert len(result["one"].samples[0]) == 4


def test_the_step_time_is_the_maximum_over_ranks_of_each_iteration(found):
    result, _ = found
    frame = result.samples.frame()
    first = frame[(frame.variant == "two") & (frame["round"] == 0) & (frame.phase == "measure")]
    slowest = first.groupby("iteration").wall_s.max().tolist()
    assert list(result["two"].samples[0]) == slowest


def test_it_says_why_it_stopped_and_reported_every_round(found):
    result, seen = found
    assert result["one"].rounds in (6, 7)
    assert [done for done, _, _ in seen] == list(range(1, result["one"].rounds + 1))
    assert seen[-1][2] == result.stopped
    assert any(word in result.stopped for word in ("interval", "budget", "most allowed"))


def test_threads_and_ranks_stand_in_every_timing(found):
    result, _ = found
    assert (result["all cores"].ranks, result["all cores"].threads) == (1, 2)
    assert "one process: " in repr(result["all cores"])
    assert "2 ranks x 1 thread)" in repr(result)
    assert result.ratio("one", "two").paired


def affinity_and_threads():
    return sorted(os.sched_getaffinity(0)), torch.get_num_threads()


def test_ranks_are_pinned_apart_while_it_runs_and_free_afterwards(ranks2):
    before = list(ranks2(affinity_and_threads))

    def make(mesh):
        seen = []

        def step():
            seen.append((sorted(os.sched_getaffinity(0)), torch.get_num_threads()))
            import sys

            sys.modules["__main__"].seen = seen[-1]

        return step

    compare({"two": Case(make, ranks=2)}, ranks=ranks2, rounds=1, max_rounds=1, iterations=1)
    here = ranks2.pull("seen")
    if len(before[0][0]) >= 2:
        assert len(here[0][0]) == len(here[1][0]) == 1
        assert here[0][0] != here[1][0]
    assert list(ranks2(affinity_and_threads)) == before
    assert list(ranks2(lambda: len(inside._sessions))) == [0, 0]


def test_oversubscription_is_labelled_and_refuses_ratios(ranks2):
    crowd = Case(spin, ranks=2, threads=4)
    result = compare(
        {"crowd": crowd, "one": Case(spin, ranks=1)}, ranks=ranks2, rounds=1, max_rounds=1,
        iterations=1, warmup=1,
    )  # fmt: skip
    assert result["crowd"].status == "oversubscribed"
    assert "oversubscribed" in result.ratio("crowd", "one").refused


def test_a_mesh_may_have_several_axes_and_must_fit_its_ranks(ranks2):
    def make(mesh):
        names = mesh.mesh_dim_names
        return lambda: dist.all_reduce(torch.ones(3), group=mesh[names[0]].get_group())

    case = Case(make, mesh={"pp": 1, "dp": 2})
    assert case.ranks == 2
    result = compare({"grid": case}, ranks=ranks2, rounds=1, max_rounds=1, iterations=2)
    assert result["grid"].ranks == 2
    with pytest.raises(ValueError, match="has 2 ranks, but ranks=3"):
        Case(make, ranks=3, mesh={"dp": 2})


def test_a_short_step_is_timed_several_in_a_row_and_the_line_says_so(ranks2):
    case = {"short": Case(spin, ranks=2)}
    found = compare(case, ranks=ranks2, rounds=1, max_rounds=1, budget_s=1)
    steps = found["short"].steps
    assert steps > 1
    assert f" samples of {steps} steps, 2 ranks" in repr(found["short"])
    block = found.samples.of("short")[0]
    lasted = block.wall_s * block.steps
    assert (block.start_s[:, 1:] >= block.start_s[:, :-1] + lasted[:, :-1]).all()
    alone = compare(case, ranks=ranks2, rounds=1, max_rounds=1, budget_s=1, sample_s=0)
    assert alone["short"].steps == 1


def test_what_is_taken_depends_on_how_long_a_step_is():
    assert taking(0.009) == inside.Taking(4, 6)  # 54 ms a sample
    assert taking(0.1) == inside.Taking(3, 1)
    assert taking(2.0, share_s=3.0) == inside.Taking(1, 1)
    assert taking(0.009, share_s=0.02) == inside.Taking(1, 2)
    assert taking(0.009, sample_s=0) == inside.Taking(23, 1)
    assert taking(0.0).steps == 50  # a clock that did not move


def test_bad_requests_are_refused_before_anything_runs(ranks2):
    with pytest.raises(ValueError, match="at least 1 rank"):
        Case(spin, ranks=-1)
    with pytest.raises(ValueError, match="nothing to compare"):
        compare({}, ranks=ranks2)
    with pytest.raises(ValueError, match="wants 3 ranks, the group has 2"):
        compare({"three": Case(spin, ranks=3)}, ranks=ranks2)
    with pytest.raises(ValueError, match="is not a range"):
        compare({"one": Case(spin, ranks=1)}, ranks=ranks2, rounds=5, max_rounds=4)
    with pytest.raises(ValueError, match="iterations=0"):
        compare({"one": Case(spin, ranks=1)}, ranks=ranks2, iterations=0)
