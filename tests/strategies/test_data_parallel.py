"""Replicas in threads equal one process, and their copies are counted phase by phase."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn

from pardemo import check, strategies
from pardemo.strategies import StrategyError
from pardemo.strategies.replicas import PHASES, replicate, scatter
from pardemo.workloads import Workload, workload
from tests.strategies import unusual


@pytest.mark.parametrize("devices", [2, 3, 4])
@pytest.mark.parametrize(
    "work",
    [
        lambda: workload("mlp"),
        unusual.frozen_gpt,
        lambda: workload("resnet-mini"),
        unusual.shared_resnet,
        unusual.shared_linear,
        unusual.plain_transformer,
    ],
)
def test_replicas_equal_one_process_after_every_step(
    work: Callable[[], Workload], devices: int
) -> None:
    said = check.strategy("data_parallel", work(), devices, batch_size=[8, 5, 7])
    assert said, said


def build(name: str = "mlp", **knobs: Any) -> tuple[Any, Workload]:
    work = workload(name, batch_size=8)
    model = work.make_model(0)
    step = strategies.get("data_parallel").build(
        model, work.make_optimizer, work.loss, None, **knobs
    )
    return step, work


def test_every_phase_is_timed_and_its_bytes_are_those_of_the_formula() -> None:
    step, work = build(devices=4)
    step.step(work.make_batch(8, 0, 0))
    assert set(step.phases.seconds) == set(PHASES)
    parameters = sum(p.numel() for p in step.model.parameters())
    assert step.phases.bytes == {
        "replicate": 3 * 4 * parameters,
        "scatter": 6 * 64 * 4,  # two of eight samples stay on the root
        "gather": 6 * 10 * 4,
        "reduce": 3 * 4 * parameters,
    }
    assert step.phases.output_gradient_bytes == step.phases.bytes["gather"]


def test_a_batch_that_leaves_a_device_without_work_copies_to_one_replica_less() -> None:
    step, work = build(devices=4)
    step.step(work.make_batch(5, 0, 0))  # dealt 2, 2, 1
    parameters = sum(p.numel() for p in step.model.parameters())
    assert step.phases.bytes["replicate"] == step.phases.bytes["reduce"] == 2 * 4 * parameters


def test_frozen_parameters_are_copied_but_send_no_gradient() -> None:
    step, work = build(devices=2)
    step.plain.layers[0].requires_grad_(False)
    step.step(work.make_batch(8, 0, 0))
    parameters = sum(p.numel() for p in step.model.parameters())
    frozen = sum(p.numel() for p in step.plain.layers[0].parameters())
    assert step.phases.bytes["replicate"] == 4 * parameters
    assert step.phases.bytes["reduce"] == 4 * (parameters - frozen)


def test_samples_are_dealt_as_torch_chunks_them() -> None:
    for samples, devices in ((8, 4), (7, 4), (5, 4), (4, 4)):
        x = torch.arange(samples)
        assert [p.tolist() for p in scatter(x, devices)] == [p.tolist() for p in x.chunk(devices)]


def test_copies_are_real_copies_that_give_their_gradients_to_the_original() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    first, second = replicate(model, 2)
    assert second[0].weight.data_ptr() != model[0].weight.data_ptr()
    assert first[1].running_mean is model[1].running_mean
    assert second[1].running_mean is not model[1].running_mean
    (first[0].weight.sum() + 2 * second[0].weight.sum()).backward()
    assert torch.equal(model[0].weight.grad, torch.full((2, 2), 3.0))


def test_an_error_in_one_thread_is_raised_and_releases_the_others() -> None:
    class Picky(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if (x[:, 0] == 7).any():
                raise RuntimeError("a seven")
            return x

    model = nn.Sequential(Picky(), nn.BatchNorm1d(2), nn.Linear(2, 2))
    step = strategies.get("data_parallel").build(
        model, torch.optim.SGD, nn.functional.mse_loss, None, devices=2
    )
    inputs = torch.ones(4, 2)
    inputs[3] = 7
    with pytest.raises(RuntimeError, match="a seven"):
        step.step((inputs, torch.ones(4, 2)))


def test_batchnorm_left_alone_is_caught_as_different_from_one_process() -> None:
    said = check.strategy("data_parallel", "resnet-mini", 2, batch_size=8, sync_batchnorm=False)
    assert not said


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(StrategyError, match="a batch of 2 leaves some of 3"):
        check.strategy("data_parallel", "mlp", 3, batch_size=2)
    with pytest.raises(StrategyError, match="devices=0"):
        build(devices=0)
    step, work = build(devices=4)
    with pytest.raises(StrategyError, match="a batch of 3 samples cannot be split into 4"):
        step.step(work.make_batch(3, 0, 0))


def test_one_device_is_the_model_itself() -> None:
    step, _ = build(devices=1)
    assert step.model is step.plain


def test_a_number_without_a_dimension_is_refused_in_words() -> None:
    with pytest.raises(StrategyError, match="number without a dimension"):
        check.strategy("data_parallel", "moe-mini", 2, batch_size=8)
