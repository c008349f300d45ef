"""The machine profile: complete, JSON, and read by predict without complaint."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pardemo import predict
from pardemo.measure import calibrate
from pardemo.measure.calibrate import LAYERS, _collectives, _middle_mean, _overlap
from pardemo.measure.calibrate_wrappers import PAIRS, apart

KINDS = ("all_reduce", "send", "all_gather", "reduce_scatter")


@pytest.fixture(scope="module")
def profile(ranks2):
    return calibrate(
        ranks=ranks2,
        sizes=(4096, 65536),
        rounds=2,
        budget_s=1,
        kinds=KINDS,
    )


def test_the_profile_is_json_that_predict_reads(profile):
    loaded = predict.load(json.loads(json.dumps(profile)))
    assert loaded.peak_source == "measured"
    assert len(loaded.curves()) == 4
    assert set(loaded.curves("beside").curves) == {("all_reduce", 2, 1)}
    assert set(loaded.curves("soon").curves) == set(loaded.curves().curves)
    assert 0 < loaded.gap_s("soon") < loaded.gap_s()


def test_every_collective_has_a_point_per_size_with_its_rounds(profile):
    points = [(r["collective"], r["size_bytes"], r.get("how", "")) for r in profile["collectives"]]
    hows = {kind: {"", "soon"} | ({"beside"} if kind == "all_reduce" else set()) for kind in KINDS}
    wanted = [(k, s, how) for k in KINDS for s in (4096, 65536) for how in hows[k]]
    assert sorted(points) == sorted(wanted)
    assert all(len(r["rounds_s"]) >= 2 for r in profile["collectives"])
    assert all(r["time_s"] > 0 for r in profile["collectives"])


class Heard:
    """A comparison in which pieces alone were slowed more than pieces with messages in between."""

    def __init__(self, status):
        self.status, self.samples = status, self
        self.timings = {"all_reduce 2 4096": self}

    def __getitem__(self, name):
        return self

    def rounds(self, name):
        best = 8.0 if name.startswith("pieces") else 8.0 + 4 * 0.5
        slow = 30.0 if name.startswith("pieces") else 20.0
        return [np.array([slow, slow]), np.array([best, slow])]


def test_on_a_busy_machine_messages_cost_what_the_least_disturbed_samples_say():
    (row,) = _collectives(Heard("contaminated"), ["all_reduce"])
    assert row["time_s"] == 0.5
    (row,) = _collectives(Heard("ok"), ["all_reduce"])
    assert row["time_s"] < 1e-6


def test_a_mean_without_its_ends_keeps_ticks_and_drops_a_disturbance():
    two_speeds = [1.0] * 10 + [5.0] * 9 + [1000.0]
    assert _middle_mean(two_speeds) == pytest.approx((6 * 1 + 6 * 5) / 12)
    assert _middle_mean([2.0]) == 2.0


def test_every_layer_kind_has_forward_and_backward(profile):
    assert len(profile["compute"]) == len(LAYERS)
    kinds = {r["kind"] for r in profile["compute"]}
    assert kinds == {"linear", "conv", "attention", "scores", "norm", "embedding"}
    assert all(r["flops"] > 0 and r["forward_s"] > 0 for r in profile["compute"])
    linear = next(r for r in profile["compute"] if r["shape"] == "64x256x256")
    assert linear["flops"] == 2 * 64 * 256 * 256


def test_what_wrappers_cost_whatever_the_size_is_calibrated(profile):
    launch = profile["launch"]
    wrapped = {"dtensor_s", "dtensor_new_s", "fsdp_s", "fsdp_tensor_s"}
    assert set(launch) == {"step_s", "microbatch_s", "collective_s"} | wrapped
    assert all(seconds >= 0 for seconds in launch.values())


def test_layers_of_the_experts_meet_new_shapes_in_every_step_and_the_others_none(ranks2):
    known, anew = ranks2(worked_out, False)[0], ranks2(worked_out, True)[0]
    assert known == 0
    assert anew >= 2 * PAIRS  # every layer, at least once


def worked_out(anew):
    """On a rank: how often DTensor works out how to carry out an operator, in a third step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    step = apart(anew)(init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    step()
    there = DTensor._op_dispatcher.sharding_propagator
    real, count = there.propagate_op_sharding_non_cached, 0

    def counted(*args, **how):
        nonlocal count
        count += 1
        return real(*args, **how)

    there.propagate_op_sharding_non_cached = counted
    try:
        step()
    finally:
        del there.propagate_op_sharding_non_cached
    return count


def test_attention_by_single_operators_counts_the_flops_of_the_fused_kernel(profile):
    flops = {(r["kind"], r["shape"]): r["flops"] for r in profile["compute"]}
    assert flops["scores", "4x4x128"] == flops["attention", "4x4x128"] == 4 * 4 * 4 * 128**2 * 32


def test_the_profile_names_its_machine_its_day_and_nothing_private(profile):
    import platform

    assert profile["machine"]["card"].startswith("CPU")
    assert len(profile["date"]) == 10
    assert platform.node() not in json.dumps({k: v for k, v in profile.items() if k != "machine"})


@pytest.mark.parametrize(
    ("exposed", "alone", "hidden", "slowdown"),
    [(0.5, 1.0, 0.5, 1.0), (1.5, 1.0, 0.0, 1.5), (0.0, 0.0, 0.0, 1.0), (-0.1, 1.0, 1.0, 1.0)],
)
def test_overlap_is_between_nothing_and_everything_and_may_cost(exposed, alone, hidden, slowdown):
    assert _overlap(exposed, alone) == {"hidden_share": hidden, "slowdown": slowdown}
