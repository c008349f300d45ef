"""The step of strategies that run all layers on every rank, whole or sliced, with replicas.

Ranks of the axis "dp" share the batch and sum their gradients; other axes have sliced the modules
before. At degree 1 everywhere it is training in one process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from pardemo.strategies import base, batchnorm, parts


class Whole(base.Step):
    """All layers on this rank; `held` are the original names of what was sliced.

    `slice_modules(model)` changes the model in place before the optimiser is made; `context()`
    surrounds forward and backward. `shards` says that FSDP holds the parameters: it then sums the
    gradients over the replicas itself. A BatchNorm takes its statistics from all replicas.
    """

    def __init__(
        self, model: nn.Module, make_optimizer: base.MakeOptimizer, loss: base.Loss,
        mesh: DeviceMesh | None, clip_grad: float | None = None,
        slice_modules: Callable[[nn.Module], Any] | None = None,
        context: Callable[[], Any] = contextlib.nullcontext, shards: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(model.to(base.this_device(mesh)))
        self.device, self.loss, self.clip_grad = base.this_device(mesh), loss, clip_grad
        self.replicas, self.context, self.shards = base.axis(mesh, "dp"), context, shards
        parts.agree(model, mesh)
        self.model = batchnorm.synchronise(self.model, self.replicas.group, self.device)
        self.held = parts.slots(self.model)
        if slice_modules is not None:
            slice_modules(self.model)
        self.optimizers = parts.optimizers(self.model.parameters(), make_optimizer)

    def step(self, batch: Any) -> torch.Tensor:
        """Forward and backward on this replica's share, sum over replicas, optimiser."""
        part, weight = base.take_shard(batch, self.replicas.rank, self.replicas.size)
        inputs, targets = base.to_device(part, self.device)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        with self.context():
            loss = self.loss(base.call(self.model, inputs), targets) * weight
            (loss * self.replicas.size if self.shards else loss).backward()  # FSDP averages
        parts.settle(self.model.parameters())
        if not self.shards and self.replicas.group is not None:
            parts.add_gradients(self.model.parameters(), self.replicas.group)
        parts.clip(self.model.parameters(), self.clip_grad)
        for optimizer in self.optimizers:
            optimizer.step()
        value = loss.full_tensor() if isinstance(loss, DTensor) else loss
        return base.reduce_sum(value, self.replicas.group)

    def state(self) -> base.State:
        """Full tensors under the original names; slices are gathered (call on every rank)."""
        return parts.read(self.held)

    def load(self, state: base.State) -> None:
        """Each rank keeps its slice of a full state dict."""
        parts.write(self.held, state)
