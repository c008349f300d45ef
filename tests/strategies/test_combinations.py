"""Two and three axes at once: equal to one process, bytes per axis, clipping, round trips."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn

from pardemo import check, strategies
from pardemo.launch import RankFailed, Ranks
from pardemo.measure import Traffic, count
from pardemo.strategies import base
from pardemo.workloads import Workload, workload
from tests.strategies import unusual

TWO_AXES = ["dp_tp", "fsdp_tp", "dp_pp", "tp_pp"]


@pytest.mark.parametrize("name", TWO_AXES)
def test_two_axes_equal_one_process_on_four_ranks(ranks4: Ranks, name: str) -> None:
    sizes = [8, 8] if name in ("dp_pp", "tp_pp") else [8, 7]
    for work in (workload("mlp"), unusual.mini_gpt(), unusual.frozen_gpt()):
        said = check.strategy(name, work, 4, batch_size=sizes, ranks=ranks4)
        assert said, said


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("dp_tp", {"sequence_parallel": True, "loss_parallel": True}),
        ("fsdp_tp", {"sequence_parallel": True}),
        ("fsdp_tp", {"reshard_after_forward": False}),
        ("dp_pp", {"schedule": "zbv"}),
        ("tp_pp", {"schedule": "interleaved1f1b"}),
        ("tp_pp", {"schedule": "gpipe", "microbatches": 1}),
    ],
)
def test_knobs_of_both_axes_leave_the_result_alone(
    ranks4: Ranks, name: str, knobs: dict[str, Any]
) -> None:
    said = check.strategy(name, unusual.mini_gpt(), 4, batch_size=[8, 8], ranks=ranks4, **knobs)
    assert said, said


def test_batchnorm_looks_at_all_replicas(ranks4: Ranks) -> None:
    said = check.strategy("dp_pp", "resnet-mini", 4, batch_size=[8, 8], ranks=ranks4)
    assert said, said
    for name in ("dp_tp", "fsdp_tp"):
        said = check.strategy(name, normalised(), 4, batch_size=[8, 7], ranks=ranks4)
        assert said, said


@pytest.mark.parametrize("name", TWO_AXES)
def test_clipping_uses_the_norm_over_all_axes(ranks4: Ranks, name: str) -> None:
    clipped = ranks4(train, unusual.mini_gpt(), name, {"clip_grad": 0.05})
    alone = train(unusual.mini_gpt(), "single", {"clip_grad": 0.05})
    assert check.same(list(clipped), alone)


@pytest.mark.parametrize("name", TWO_AXES)
def test_state_goes_out_and_in_over_two_axes(ranks4: Ranks, name: str) -> None:
    for before, after in ranks4(round_trip, unusual.mini_gpt(), name):
        assert check.same(after, before, 0.0)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_an_axis_of_degree_one_is_left_out(ranks2: Ranks, shape: tuple[int, int]) -> None:
    for name in TWO_AXES:
        said = check.strategy(
            name, unusual.mini_gpt(), 2, batch_size=[8], ranks=ranks2, shape=shape
        )
        assert said, (name, said)


def test_data_times_tensor_sends_each_axis_its_own_bytes(ranks4: Ranks) -> None:
    layers, hidden, activation = 3, 32, 4 * 16 * 32 * 4  # 4 of 8 samples per row of the mesh
    per_layer = 4 * hidden * hidden + 2 * 4 * hidden * hidden  # wq wk wv wo, up and down
    held = layers * per_layer // 2 + 256 * hidden + 16 * hidden + (2 * layers + 1) * hidden
    for traffic in ranks4(traffic_of, unusual.mini_gpt(), "dp_tp"):
        assert traffic.sent_bytes(group="tp") == 4 * layers * activation
        loss = 4
        assert traffic.sent_bytes(group="dp") == held * 4 + loss


def test_a_pipeline_of_slices_sends_its_boundary_once_per_slice(ranks4: Ranks) -> None:
    knobs = {"microbatches": 4}
    micro = 2 * 16 * 32 * 4  # 2 samples of 16 tokens of width 32
    for traffic in ranks4(traffic_of, unusual.mini_gpt(), "tp_pp", knobs):
        assert traffic.sent_bytes(kind="send") == 4 * micro
        assert traffic.calls(group="tp") % (4 * 4) == 0  # 4 per layer and microbatch


def test_three_axes_equal_one_process_on_eight_small_ranks(ranks8: Ranks) -> None:
    work = unusual.mini_gpt()
    said = check.strategy("dp_pp_tp", work, 8, batch_size=[8, 8], ranks=ranks8)
    assert said, said
    clipped = ranks8(train, work, "dp_pp_tp", {"clip_grad": 0.05})
    assert check.same(list(clipped), train(work, "single", {"clip_grad": 0.05}))


def test_what_two_axes_cannot_do_is_refused(ranks4: Ranks) -> None:
    with pytest.raises(RankFailed, match="a batch of 7 cannot be cut equally over 2 pipelines"):
        ranks4(train, unusual.mini_gpt(), "dp_pp", {}, 7)
    against = strategies.reasons_against("tp_pp", unusual.plain_transformer().make_model(0), 4, 8)
    assert any("traced" in reason for reason in against)
    assert (
        "divide" in strategies.reasons_against("dp_tp", workload("gpt-mini").make_model(0), 9, 9)[0]
    )
    assert base.factor(8, 3) == (2, 2, 2)


def train(work: Workload, name: str, knobs: dict[str, Any], size: int = 8) -> Any:
    row = strategies.get(name)
    mesh = row.mesh() if name != "single" else None
    model = work.make_model(0).double()  # rounding would hide a norm that is slightly wrong
    step = row.build(model, work.make_optimizer, work.loss, mesh, **knobs)
    losses = [float(step.step(work.make_batch(size, i, 0))) for i in range(2)]
    return check.Trace(tuple(losses), (step.state(),) * 2)


def normalised() -> Workload:
    """A pair that can be cut, a BatchNorm, a head."""

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        pair = [nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8)]
        return nn.Sequential(*pair, nn.BatchNorm1d(8), nn.Linear(8, 10))

    digits = workload("mlp")
    return Workload("normalised", make, digits.make_batch, digits.loss, digits.make_optimizer, 8)


def round_trip(work: Workload, name: str) -> Any:
    row = strategies.get(name)
    mesh = row.mesh()
    step, other = (
        row.build(work.make_model(seed), work.make_optimizer, work.loss, mesh) for seed in (0, 1)
    )
    step.step(work.make_batch(8, 0, 0))
    before = step.state()
    other.load(before)
    return before, other.state()


def traffic_of(work: Workload, name: str, knobs: dict[str, Any] | None = None) -> Traffic:
    row = strategies.get(name)
    step = row.build(
        work.make_model(0), work.make_optimizer, work.loss, row.mesh(), **(knobs or {})
    )
    batch = work.make_batch(8, 0, 0)
    return count(lambda: step.step(batch), warmup=1)


@pytest.fixture(scope="module")
def ranks8() -> Iterator[Ranks]:
    """Eight warm ranks: correctness and bytes, never speed."""
    with Ranks(8, timeout=120) as ranks:
        yield ranks
