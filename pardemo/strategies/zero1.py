"""ZeRO stage 1: data parallelism in which every rank keeps a part of the optimiser's state.

Split      the batch, and the optimiser's state: each parameter tensor belongs to one rank, which
           alone updates it. Tensors are dealt out whole, the largest first, to the least loaded.
Sent       DDP's all-reduce of the gradients, 2(N-1)/N P b per rank and step; then every rank
           broadcasts the tensors that it updated: each leaves some rank N-1 times, (N-1)/N P b
           per rank in the mean, its owner sending most. A reduce-scatter and an all-gather would
           do with 2(N-1)/N P b together (Rajbhandari 2020, section 7.1): torch's
           ZeroRedundancyOptimizer pays for working with unchanged DDP.
Memory     parameters and gradients whole, optimiser state 1/N (about: tensors are not cut).
Paper      Rajbhandari et al. 2020, "ZeRO", section 5.1.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.optim import ZeroRedundancyOptimizer

from pardemo.strategies import base, ddp_wrap


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """Which rank updates each tensor: the largest first, to the rank that has least so far."""
    loads, found = [0] * ranks, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        found[i] = loads.index(min(loads))
        loads[found[i]] += sizes[i]
    return found


class Zero1(base.Step):
    """DDP with an optimiser whose state is dealt out over the ranks of `place`."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: base.Loss,
        place: base.Axis, device: torch.device, plain: nn.Module, accumulate: int,
        clip_grad: float | None,
    ) -> None:  # fmt: skip
        super().__init__(model, optimizer)
        self.parameters = tuple(plain.parameters())
        self.loss, self.place, self.device, self.plain = loss, place, device, plain
        self.accumulate, self.clip_grad = accumulate, clip_grad

    def step(self, batch: Any) -> torch.Tensor:
        """As DDP; then every rank updates its tensors and broadcasts them."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        parts = base.microbatches(batch, self.place, self.accumulate)
        total = torch.zeros((), device=self.device)
        for index, (part, weight) in enumerate(parts):
            with ddp_wrap.sending(self.model, index == len(parts) - 1):
                inputs, targets = base.to_device(part, self.device)
                value = self.loss(base.call(self.model, inputs), targets) * weight
                (value * self.place.size).backward()  # DDP divides the sum by the number of ranks
            total = total + value.detach()
        ddp_wrap.refuse_unused(self.model, self.parameters)
        base.clip_gradients(self.model.parameters(), self.clip_grad)
        self.optimizer.step()  # every rank broadcasts the tensors it updated
        return base.reduce_sum(total, self.place.group)

    def original(self) -> nn.Module:
        return self.plain

    def optimizer_state(self) -> dict[str, Any] | None:
        """The whole optimiser's state dict, gathered on the first rank; None on the others.

        It has the form that a plain optimiser over the same parameters would return, on the CPU.
        """
        assert self.optimizer is not None
        if not isinstance(self.optimizer, ZeroRedundancyOptimizer):
            return copy.deepcopy(self.optimizer.state_dict())
        self.optimizer.consolidate_state_dict(to=self.place.ranks[0])  # moves every rank's state
        return self.optimizer.state_dict() if self.place.rank == 0 else None


def build(
    model: nn.Module, make_optimizer: base.MakeOptimizer, loss: base.Loss,
    mesh: DeviceMesh | None = None, *, accumulate: int = 1, clip_grad: float | None = None,
    find_unused_parameters: bool = False,
) -> Zero1:  # fmt: skip
    """DDP over the axis "dp" with ZeroRedundancyOptimizer around the class that is asked for."""
    place, device = base.axis(mesh, "dp"), base.this_device(mesh)
    model = ddp_wrap.prepare(model, place, device)
    # Made once to learn its class and settings; without a step it keeps no state.
    optimizer, wrapped = make_optimizer(model.parameters()), model
    if place.group is not None:
        wrapped = ddp_wrap.wrap(
            model, place, device, gradient_as_bucket_view=True,
            find_unused_parameters=find_unused_parameters,
        )  # fmt: skip
        optimizer = ZeroRedundancyOptimizer(
            optimizer.param_groups,
            optimizer_class=type(optimizer),
            process_group=place.group,
            **_settings(optimizer),
        )
    return Zero1(wrapped, optimizer, loss, place, device, model, accumulate, clip_grad)


def _settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The defaults that the optimiser's class takes (AdamW keeps more than it takes)."""
    takes = inspect.signature(type(optimizer)).parameters
    return {name: value for name, value in optimizer.defaults.items() if name in takes}


STRATEGY = base.Strategy(
    name="zero1",
    title="ZeRO-1: optimiser state in parts",
    axes=("dp",),
    build=build,
    reasons_against=base.too_few_samples,
    knobs={
        "accumulate": "microbatches per optimiser step, sent once",
        "clip_grad": "largest global gradient norm",
        "find_unused_parameters": "some parameters may get no gradient",
    },
    lesson="08_fsdp_and_zero",
)
