"""One process, one device: the yardstick every other strategy must equal.

Split: nothing. Sent: nothing. Memory: parameters, gradients and optimiser state, all of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh

from pardemo.strategies import base


class Single(base.Step):
    """Train the whole model on the whole batch; with `accumulate`, in that many microbatches."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: base.Loss,
        device: torch.device, accumulate: int, clip_grad: float | None,
    ) -> None:  # fmt: skip
        super().__init__(model, optimizer)
        self.loss, self.device = loss, device
        self.accumulate, self.clip_grad = accumulate, clip_grad

    def step(self, batch: Any) -> torch.Tensor:
        """Forward, backward, optimiser; weighted microbatch gradients add up to the batch's."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for index in range(self.accumulate):
            part, weight = base.take_shard(batch, index, self.accumulate)
            inputs, targets = base.to_device(part, self.device)
            value = self.loss(base.call(self.model, inputs), targets) * weight
            value.backward()
            total = total + value.detach()
        base.clip_gradients(self.model.parameters(), self.clip_grad)
        self.optimizer.step()
        return total


def build(
    model: nn.Module, make_optimizer: base.MakeOptimizer, loss: base.Loss,
    mesh: DeviceMesh | None = None, *, accumulate: int = 1, clip_grad: float | None = None,
) -> Single:  # fmt: skip
    """Train `model` in this process alone, whatever the mesh."""
    device = base.this_device(mesh)
    model = model.to(device)
    return Single(model, make_optimizer(model.parameters()), loss, device, accumulate, clip_grad)


STRATEGY = base.Strategy(
    name="single",
    title="one process",
    axes=(),
    build=build,
    one_process=lambda knobs: True,
    knobs={
        "accumulate": "microbatches per optimiser step",
        "clip_grad": "largest global gradient norm",
    },
)
