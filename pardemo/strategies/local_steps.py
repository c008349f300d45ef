"""Steps without talking: what local SGD and DiLoCo share, and the meeting they differ in."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from pardemo.strategies import base


class LocalSteps(base.Step):
    """Steps of this rank's own optimiser; every `every` steps, `average` brings ranks together."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: base.Loss, axis: base.Axis,
        device: torch.device, every: int,
    ) -> None:  # fmt: skip
        super().__init__(model, optimizer)
        if every < 1:
            raise base.StrategyError(f"every must be at least 1 step, not {every}")
        self.loss, self.axis, self.device, self.every = loss, axis, device, every
        self.steps = 0

    def step(self, batch: Any) -> torch.Tensor:
        """Train on this rank's part; the returned loss is local except in steps that average."""
        assert self.optimizer is not None
        part, weight = base.take_shard(batch, self.axis.rank, self.axis.size)
        inputs, targets = base.to_device(part, self.device)
        self.optimizer.zero_grad()
        value = self.loss(self.model(inputs), targets)
        # an unequal part counts by its samples: n x weight is 1 where parts are equal
        (value * weight * self.axis.size).backward()
        self.optimizer.step()
        self.steps += 1
        if self.steps % self.every:
            return value.detach()
        self.average()
        return base.reduce_sum(value.detach() * weight, self.axis.group)

    def average(self) -> None:
        """Give every rank the mean of the ranks' models."""
        copy_mean(shared(self.model), self.axis)

    def state(self) -> base.State:
        """The mean of the ranks' models, whether or not a step has just averaged (collective)."""
        if self.axis.group is None:
            return super().state()
        return {
            key: (base.reduce_mean(value, self.axis.group) if value.is_floating_point() else value)
            .detach()
            .to("cpu", copy=True)
            for key, value in self.model.state_dict().items()
        }


def shared(model: nn.Module) -> list[torch.Tensor]:
    """What is averaged: parameters and floating-point buffers, a tied tensor once."""
    tensors = dict.fromkeys([*model.parameters(), *model.buffers()])
    return [tensor.detach() for tensor in tensors if tensor.is_floating_point()]


@torch.no_grad()
def copy_mean(tensors: list[torch.Tensor], axis: base.Axis) -> None:
    """Replace `tensors` by their mean over the axis, in one all-reduce."""
    if axis.group is None:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    mean = base.reduce_mean(flat, axis.group)
    for tensor, part in zip(tensors, mean.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
