"""DiLoCo: local training for many steps, then one outer step along the ranks' mean movement.

Split: the batch. Sent: every `every` steps one all-reduce of how far each rank has moved,
2(n-1)/n x the parameters' bytes per rank; nothing in between. Memory: as one process, plus the
parameters as they were at the last meeting and the outer momentum: two more copies.

NOT equal to one process. At every=1, outer_lr=1 and momentum=0 the outer step is the mean of the
ranks' models, that is local SGD. The loss of a step is this rank's own, except where ranks meet.

Douillard et al. 2023, "DiLoCo: distributed low-communication training of language models": AdamW
inside, SGD with Nesterov momentum 0.9 and learning rate 0.7 outside.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh

from pardemo.strategies import base
from pardemo.strategies.local_steps import LocalSteps, copy_mean


class DiLoCo(LocalSteps):
    """Local steps; `average` is the outer optimiser's step on the mean movement."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: base.Loss, axis: base.Axis,
        device: torch.device, every: int, outer_lr: float, momentum: float,
    ) -> None:  # fmt: skip
        super().__init__(model, optimizer, loss, axis, device, every)
        self.anchors = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
        self.outer = torch.optim.SGD(
            self.anchors, lr=outer_lr, momentum=momentum, nesterov=momentum > 0
        )

    @torch.no_grad()
    def average(self) -> None:
        """Move the anchors by the outer optimiser, and every rank's model onto them."""
        moved = [a - p for a, p in zip(self.anchors, self.model.parameters(), strict=True)]
        buffers = [b for b in self.model.buffers() if b.is_floating_point()]
        copy_mean([*moved, *buffers], self.axis)
        for anchor, gradient in zip(self.anchors, moved, strict=True):
            anchor.grad = gradient
        self.outer.step()
        for parameter, anchor in zip(self.model.parameters(), self.anchors, strict=True):
            parameter.copy_(anchor)


def build(
    model: nn.Module, make_optimizer: base.MakeOptimizer, loss: base.Loss,
    mesh: DeviceMesh | None = None, *, every: int = 8, outer_lr: float = 0.7, momentum: float = 0.9,
) -> DiLoCo:  # fmt: skip
    """DiLoCo over the mesh's axis "dp", meeting every `every` steps."""
    axis, device = base.axis(mesh, "dp"), base.this_device(mesh)
    model = model.to(device)
    base.broadcast_module(model, axis.group)
    optimizer = make_optimizer(model.parameters())
    return DiLoCo(model, optimizer, loss, axis, device, every, outer_lr, momentum)


STRATEGY = base.Strategy(
    name="diloco",
    title="DiLoCo",
    axes=("dp",),
    build=build,
    reasons_against=base.too_few_samples,
    knobs={
        "every": "steps between two meetings",
        "outer_lr": "learning rate of the outer step",
        "momentum": "Nesterov momentum of the outer step",
    },
    lesson="11_many_nodes",
)
