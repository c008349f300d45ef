"""Local SGD and DiLoCo send what they say, and are equal to one process exactly where they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from pardemo import check, workloads
from pardemo.launch import Ranks
from pardemo.strategies import StrategyError, diloco, local_sgd


def test_local_sgd_that_averages_every_step_is_data_parallelism(ranks2: Ranks) -> None:
    assert check.strategy(local_sgd.STRATEGY, "mlp", 2, ranks=ranks2, every=1)
    odd = check.strategy(
        local_sgd.STRATEGY, "mlp", 2, batch_size=[63, 64, 65], ranks=ranks2, every=1
    )
    assert odd


def test_local_sgd_that_averages_less_often_is_not_and_is_told(ranks2: Ranks) -> None:
    verdict = check.strategy(local_sgd.STRATEGY, "mlp", 2, steps=4, ranks=ranks2, every=4)
    assert not verdict
    assert "step" in repr(verdict)


def test_diloco_with_a_plain_outer_step_is_local_sgd(ranks2: Ranks) -> None:
    plain = {"every": 1, "outer_lr": 1.0, "momentum": 0.0}
    assert check.strategy(diloco.STRATEGY, "mlp", 2, ranks=ranks2, **plain)


def calls(name: str, steps: int, **knobs: Any) -> tuple[list[int], list[float], float]:
    """Elements of every all-reduce, the losses, and how far the ranks are apart at the end."""
    seen: list[int] = []
    real = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    row = {"local_sgd": local_sgd.STRATEGY, "diloco": diloco.STRATEGY}[name]
    work = workloads.workload("mlp")
    step = row.build(
        work.make_model(dist.get_rank()), workloads.adamw, work.loss, row.mesh(), **knobs
    )
    dist.all_reduce = counted
    try:
        losses = [float(step.step(work.make_batch(64, n, 0))) for n in range(steps)]
    finally:
        dist.all_reduce = real
    flat = torch.cat([p.detach().flatten() for p in step.model.parameters()])
    other = flat.clone()
    dist.broadcast(other, 0)  # moves the parameters once
    return seen, losses, float((flat - other).abs().max())


@pytest.mark.parametrize("name", ["local_sgd", "diloco"])
def test_parameters_are_sent_once_in_every_so_many_steps(ranks2: Ranks, name: str) -> None:
    parameters = sum(p.numel() for p in workloads.workload("mlp").make_model(0).parameters())
    seen, losses, apart = ranks2(calls, name, 24, every=8)[1]
    assert seen == [parameters, 1] * 3  # the second is the loss of a step that meets
    assert apart == 0.0
    assert losses[-1] < losses[0]
    assert ranks2(calls, name, 23, every=8)[1][2] > 0.0


@pytest.mark.parametrize("row", [local_sgd.STRATEGY, diloco.STRATEGY])
def test_zero_steps_between_meetings_are_refused(row: Any) -> None:
    work = workloads.workload("mlp")
    with pytest.raises(StrategyError, match="at least 1 step, not 0"):
        row.build(work.make_model(0), work.make_optimizer, work.loss, None, every=0)
