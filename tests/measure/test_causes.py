"""The causes of diagnose() on made-up records, where every part of a step is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pardemo.measure import diagnose
from pardemo.measure.observe import Run
from pardemo.measure.probes import AdamW, Wire
from pardemo.measure.roads import Road
from pardemo.measure.traffic import Flow, Traffic
from pardemo.measure.watched import RankRecord, StepRecord, Wrapper


def made_up(own=(0.1, 0.1), moved=(0.0, 0.0), data=0.0, threads=1, cores=2, backwards=1,
            wrappers=(), traffic=None, wire=None, **more):  # fmt: skip
    """Records of eight equal steps; with wrappers, what is moved are gradients."""
    wall = max(o + m for o, m in zip(own, moved, strict=True)) + data
    records = tuple(
        RankRecord(
            rank, threads, 4,
            (StepRecord(
                wall, m, data, o, 0.0, backwards, drained_s=m if wrappers else 0.0,
                backward_s=o / 2, **{k: v[rank] for k, v in more.items()},
            ),) * 8,
            traffic, wrappers, wire=wire,
        )
        for rank, (o, m) in enumerate(zip(own, moved, strict=True))
    )  # fmt: skip
    return Run(records, cores, name="made up")


def starved_beside_slow():
    """Rank 0 waits 30 ms for data, rank 1 works 50 ms longer."""
    rows = ((0.12, 0.02, 0.03), (0.12, 0.0, 0.0))
    steps = [(StepRecord(w, c, d, 0.0, 0.0, 1),) * 8 for w, c, d in rows]
    return Run(tuple(RankRecord(r, 1, 4, s, None, ()) for r, s in enumerate(steps)), 2)


def test_a_healthy_run_is_left_alone():
    found = diagnose(made_up(moved=(0.005, 0.005)))
    assert not found
    assert "nothing stands out" in repr(found)


def test_transfer_longer_than_the_work_is_a_tiny_batch():
    found = diagnose(made_up(own=(0.01, 0.01), moved=(0.02, 0.02)))
    assert found.causes == ["tiny batch"]
    assert found.findings[0].lost_s == pytest.approx(0.02)
    assert "its 4 samples" in repr(found)


def test_one_bucket_that_nothing_hides_is_named():
    wrapper = Wrapper(False, 0, 8_000_000, (8_000_000,))
    found = diagnose(made_up(moved=(0.05, 0.05), wrappers=(wrapper,)))
    assert found.causes == ["one huge bucket"]
    several = Wrapper(False, 0, 8_000_000, (2_000_000,) * 4)
    assert not diagnose(made_up(moved=(0.05, 0.05), wrappers=(several,)))


def test_few_parameters_in_few_buckets_are_not_called_tiny():
    small = Wrapper(False, 0, 90_000, (30_000,) * 3)
    assert not diagnose(made_up(wrappers=(small,)))
    mixed = Wrapper(False, 0, 4_208_192, (2048, 1_050_000) * 4)
    assert diagnose(made_up(wrappers=(mixed,))).causes == ["many tiny buckets"]
    lowered = Wrapper(False, 0, 2_700_000, (300_000,) * 9, 10_000)
    run = made_up(moved=(0.03, 0.03), wrappers=(lowered,), wire=Wire(1e-3, 1e-9))
    assert diagnose(run).causes == ["many tiny buckets"]
    large = Wrapper(False, 0, 9_450_000, (1_050_000,) * 9, 2**20)
    assert not diagnose(made_up(moved=(0.03, 0.03), wrappers=(large,), wire=Wire(1e-3, 1e-9)))
    fast = made_up(moved=(0.03, 0.03), wrappers=(lowered,), wire=Wire(1e-6, 1e-9))
    assert not diagnose(fast)


def test_a_single_bucket_within_the_default_is_not_blamed_for_a_tiny_batch():
    default = Wrapper(False, 0, 8_000_000, (8_000_000,), 25 * 2**20)
    tiny = made_up(own=(0.01, 0.01), moved=(0.02, 0.02), wrappers=(default,))
    assert diagnose(tiny).causes == ["tiny batch"]
    raised = Wrapper(False, 0, 2_000_000, (2_000_000,), 1000 * 2**20)
    assert diagnose(made_up(moved=(0.03, 0.03), wrappers=(raised,))).causes == ["one huge bucket"]


def test_a_rank_that_was_pushed_off_its_core_is_not_blamed_for_another_that_works_longer():
    steps = {  # wall, communication, data, cpu, queued, backwards, pushed
        0: StepRecord(0.149, 0.027, 0.0, 0.03, 0.09, 1, 0.09),
        1: StepRecord(0.149, 0.020, 0.0, 0.03, 0.04, 1, 0.04),
    }
    records = tuple(RankRecord(r, 1, 4, (step,) * 8, None, ()) for r, step in steps.items())
    found = diagnose(Run(records, 2)).findings[0]
    assert found.cause == "slow rank"
    assert found.evidence.startswith("rank 1 works")


def test_bytes_on_the_slower_of_two_networks_are_the_wrong_interface():
    slow = Road("eth1", "10.78.0.1", 9_000_000, 12.5e6)
    fast = Road("eth0", "10.77.0.1", 40_000, 900e6)
    run = made_up(moved=(0.05, 0.05))
    records = (replace(run.records[0], roads=(slow, fast)), run.records[1])
    found = diagnose(replace(run, records=records))
    assert found.causes == ["wrong network interface"]
    assert "went over eth1 (10.78.0.1)" in found.findings[0].evidence
    assert "GLOO_SOCKET_IFNAME=eth0" in found.findings[0].remedy
    right = (replace(slow, sent_bytes=40_000), replace(fast, sent_bytes=9_000_000))
    records = (replace(run.records[0], roads=right), run.records[1])
    assert not diagnose(replace(run, records=records))


def test_waiting_for_a_slow_rank_is_not_called_transfer():
    found = diagnose(made_up(own=(0.02, 0.1), moved=(0.09, 0.01)))
    assert found.causes == ["slow rank"]
    assert found.findings[0].lost_s == pytest.approx(0.08)


def test_the_costliest_cause_comes_first():
    found = diagnose(made_up(own=(0.05, 0.1), moved=(0.05, 0.0), data=0.2))
    assert found.causes == ["starved DataLoader", "slow rank"]
    assert found.lost_s == pytest.approx(0.2 + 0.05)


def test_causes_that_hide_each_other_share_what_they_cost_together():
    found = diagnose(starved_beside_slow())
    assert found.causes == ["slow rank", "starved DataLoader"]
    slow, starved = (finding.lost_s for finding in found.findings)
    assert slow == pytest.approx((0.02 + 0.05) / 2)  # alone it saves 20 ms, at last 50
    assert starved == pytest.approx((0.0 + 0.03) / 2)  # alone nothing: the slow rank is later


@pytest.mark.parametrize("seed", range(5))
def test_all_causes_together_never_cost_more_than_the_step(seed):
    rng = np.random.default_rng(seed)
    wrapper = Wrapper(True, 0, 400_000, (50_000,) * 8, 1000)
    flow = Flow("all_reduce", "world", "backward", 2, 40, 1_600_000, 0.0, 0.0)
    moved, own = rng.uniform(0.0, 0.1, 2), rng.uniform(0.0, 0.2, 2)
    run = made_up(
        own, moved, rng.uniform(0, 0.3), threads=4, backwards=4, wrappers=(wrapper,),
        traffic=Traffic(0, (flow,)), wire=Wire(1e-3, 1e-9), pushed_s=own / 3, saved_s=own / 4,
        searched_s=own / 9, outside_s=own / 5,
    )  # fmt: skip
    found = diagnose(run)
    assert len(found.causes) >= 5
    assert found.lost_s <= run.step_s
    lost = [finding.lost_s for finding in found.findings]
    assert lost == sorted(lost, reverse=True)


def test_a_repeated_transfer_in_crumbs_is_two_causes_and_not_a_tiny_batch():
    wrapper = Wrapper(False, 0, 80_000, (10_000,) * 8, 10_000)
    flow = Flow("all_reduce", "world", "backward", 2, 32, 320_000, 0.0, 0.0)
    run = made_up(
        moved=(0.1, 0.1), backwards=4, wrappers=(wrapper,), traffic=Traffic(0, (flow,)),
        wire=Wire(1e-3, 1e-9),
    )  # fmt: skip
    found = diagnose(run)
    assert sorted(found.causes) == ["many tiny buckets", "no_sync forgotten"]
    once, one = 1 / 4, 1 - 7e-3 / 8.08e-3  # what is left without each cause
    assert found.lost_s == pytest.approx(0.1 * (1 - once * one))


def test_a_rank_that_is_late_in_half_of_the_steps_is_not_called_slow():
    def steps(late):
        return tuple(
            StepRecord(0.2, 0.1 - 0.1 * (i % 2 == late), 0.0, 0.0, 0.0, 1) for i in range(12)
        )

    run = Run(tuple(RankRecord(r, 1, 4, steps(r), None, ()) for r in range(2)), 2)
    assert not diagnose(run)


def test_a_slow_rank_is_told_apart_by_its_samples_and_by_the_part_of_the_step():
    found = diagnose(made_up((0.1, 0.2), (0.1, 0.0), samples=(4, 16), outside_s=(0.0, 0.08)))
    assert found.causes == ["slow rank"]
    assert "16 samples in a forward, another 4" in found.findings[0].evidence
    assert "80.0 ms of it in the script outside of forward" in found.findings[0].evidence


def test_an_optimizer_is_slow_where_adamw_is_much_faster():
    run = made_up(optimizer_s=(0.06, 0.05))
    assert not diagnose(run)
    records = tuple(replace(record, adamw=AdamW(0.01)) for record in run.records)
    found = diagnose(replace(run, records=records))
    assert found.causes == ["slow optimizer"]
    assert found.findings[0].lost_s == pytest.approx(0.04)  # rank 1 is the last one then
    usual = tuple(replace(record, adamw=AdamW(0.04)) for record in run.records)
    assert not diagnose(replace(run, records=usual))


def test_the_same_stage_imbalance_is_a_pipelines_when_ranks_send_to_each_other():
    flow = Flow("send", "world", "forward", 2, 4, 1000, 1000.0, 1000.0)
    found = diagnose(made_up(own=(0.02, 0.1), moved=(0.09, 0.01), traffic=Traffic(0, (flow,))))
    assert found.causes == ["imbalanced pipeline"]
