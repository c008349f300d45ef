"""Local SGD: ranks train alone on their part of the batch; parameters are averaged now and then.

Split: the batch. Sent: nothing in most steps; every `every` steps one all-reduce of all parameters
and floating buffers, 2(n-1)/n x their bytes per rank: 1/every of what data parallelism sends.
Memory: as one process, plus one flat copy of the parameters while they are averaged.

NOT equal to one process: between two averagings the ranks' models drift apart, and after them the
optimiser's own state stays local. With every=1 and plain or momentum SGD, whose step is linear in
the gradient, it is data parallelism exactly; with anything else `check.same` says it is not.
The loss of a step is this rank's own, except in a step that averages, where it is the global mean.

Stich 2019, "Local SGD converges fast and communicates little"; Lin et al. 2020.
"""

from __future__ import annotations

import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh

from pardemo.strategies import base
from pardemo.strategies.local_steps import LocalSteps


def build(
    model: nn.Module, make_optimizer: base.MakeOptimizer, loss: base.Loss,
    mesh: DeviceMesh | None = None, *, every: int = 8,
) -> LocalSteps:  # fmt: skip
    """Local SGD over the mesh's axis "dp", averaging every `every` steps; alone at degree 1."""
    axis, device = base.axis(mesh, "dp"), base.this_device(mesh)
    model = model.to(device)
    base.broadcast_module(model, axis.group)
    return LocalSteps(model, make_optimizer(model.parameters()), loss, axis, device, every)


STRATEGY = base.Strategy(
    name="local_sgd",
    title="local SGD",
    axes=("dp",),
    build=build,
    reasons_against=base.too_few_samples,
    knobs={"every": "steps between two averagings of the parameters"},
    lesson="11_many_nodes",
)
