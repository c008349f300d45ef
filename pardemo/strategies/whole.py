"""The step of strategies that run all layers on every rank, whole or sliced, with replicas.

Ranks of the axis "dp" share the batch and sum their gradients; other axes have sliced the modules
before. At degree 1 everywhere it is training in one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh

from pardemo.strategies import base, parts

Forward = Callable[[nn.Module, Any, Any], torch.Tensor]


class Whole(base.Step):
    """All layers on this rank; `held` are the original names of what `slice_modules` may slice.

    `slice_modules(model)` changes the model in place before the optimiser is made. `forward` runs
    model and loss; by default loss(model(inputs), targets).
    """

    def __init__(
        self, model: nn.Module, make_optimizer: base.MakeOptimizer, loss: base.Loss,
        mesh: DeviceMesh | None, clip_grad: float | None = None,
        slice_modules: Callable[[nn.Module], Any] | None = None, forward: Forward | None = None,
        sum_gradients: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(model.to(base.this_device(mesh)))
        self.device, self.loss, self.clip_grad = base.this_device(mesh), loss, clip_grad
        self.replicas, self.forward = base.axis(mesh, "dp"), forward
        self.sum_gradients = sum_gradients
        parts.agree(model, mesh)
        self.held = parts.slots(model)
        if slice_modules is not None:
            slice_modules(model)
        self.optimizers = parts.optimizers(self.model.parameters(), make_optimizer)

    def step(self, batch: Any) -> torch.Tensor:
        """Forward and backward on this replica's share, sum over replicas, optimiser."""
        part, weight = base.take_shard(batch, self.replicas.rank, self.replicas.size)
        inputs, targets = base.to_device(part, self.device)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if self.forward is None:
            loss = self.loss(base.call(self.model, inputs), targets) * weight
        else:
            loss = self.forward(self.model, inputs, targets) * weight
        loss.backward()
        if self.sum_gradients and self.replicas.group is not None:
            parts.add(parts.gradients(self.model.parameters()), self.replicas.group)
        parts.clip(self.model.parameters(), self.clip_grad)
        for optimizer in self.optimizers:
            optimizer.step()
        return base.reduce_sum(loss, self.replicas.group)

    def state(self) -> base.State:
        """Full tensors under the original names; slices are gathered (call on every rank)."""
        return parts.read(self.held)

    def load(self, state: base.State) -> None:
        """Each rank keeps its slice of a full state dict."""
        parts.write(self.held, state)
