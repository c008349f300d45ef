"""Data parallel with one process per device: torch's DistributedDataParallel (Li 2020).

Split: the batch. Every rank holds the whole model and works on its part of the batch.
Sent: gradients, averaged by all-reduce in buckets while the backward pass goes on: per rank and
step 2(N-1)/N * P b bytes (N ranks, P parameters of b bytes); half with the fp16 and bf16 hooks;
once per step however many microbatches are accumulated under no_sync. Besides: the parameters and
buffers once, from rank 0, at the start; the loss, one number per step; BatchNorm, see batchnorm.py.
Where ranks meet is the backward pass: optimizer.step() is local and sends nothing.
Memory: parameters, gradients, optimiser state, and the buckets, one more copy of the gradients
unless gradient_as_bucket_view.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from pardemo.strategies import base, comm_hooks, ddp_wrap


class DDP(base.Step):
    """Train this rank's part of the batch; gradients are weighted so that they sum to the mean's.

    DDP divides by the number of ranks, so a part of w of all samples is multiplied by w * N first:
    parts of unequal size then give exactly the full batch's gradient.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: base.Loss,
        place: base.Axis, device: torch.device, plain: nn.Module, *,
        accumulate: int = 1, clip_grad: float | None = None, autocast: bool = False,
        sync_first: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(model, optimizer)
        self.parameters = tuple(plain.parameters())
        self.loss, self.place, self.device, self.plain = loss, place, device, plain
        self.accumulate, self.clip_grad, self.autocast = accumulate, clip_grad, autocast
        self.sync_first = sync_first

    def step(self, batch: Any) -> torch.Tensor:
        """Forward and backward per microbatch (only the last one sends), then the optimiser."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        parts = base.microbatches(batch, self.place, self.accumulate)
        total = torch.zeros((), device=self.device)
        for index, (part, weight) in enumerate(parts):
            last = index == len(parts) - 1
            with ddp_wrap.sending(self.model, last or self.sync_first):
                total = total + self.forward_backward(part, weight * self.place.size)
        self.sync_first = False
        ddp_wrap.refuse_unused(self.model, self.parameters)
        base.clip_gradients(self.model.parameters(), self.clip_grad)
        self.optimizer.step()
        return base.reduce_mean(total, self.place.group)  # moves one number

    def forward_backward(self, part: Any, weight: float) -> torch.Tensor:
        """Gradients of weight * loss on one part; returns the weighted loss."""
        inputs, targets = base.to_device(part, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            value = self.loss(base.call(self.model, inputs), targets) * weight
        value.backward()  # moves the gradients, bucket by bucket, unless under no_sync
        return value.detach()

    def uneven(self, parts: Iterable[Any], shadow: bool = True) -> list[float]:
        """Train on this rank's own list of batches, when ranks may have lists of unequal length.

        Under `join` a rank that has run out answers the others' all-reduces with zeros; gradients
        are divided by the ranks still at work. `shadow=False` raises on every rank as soon as one
        runs out, where plain DDP would wait for ever. Returns this rank's losses.
        """
        assert self.optimizer is not None
        losses = []
        with self.joining(shadow):
            for part in parts:
                self.optimizer.zero_grad()
                losses.append(float(self.forward_backward(part, 1.0)))
                base.clip_gradients(self.model.parameters(), self.clip_grad)
                self.optimizer.step()
        return losses

    def joining(self, shadow: bool) -> contextlib.AbstractContextManager[Any]:
        if not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.join(
            divide_by_initial_world_size=False, throw_on_early_termination=not shadow
        )

    def original(self) -> nn.Module:
        return self.plain


def build(
    model: nn.Module, make_optimizer: base.MakeOptimizer, loss: base.Loss,
    mesh: DeviceMesh | None = None, *, bucket_cap_mb: float | None = None,
    gradient_as_bucket_view: bool = False, static_graph: bool = False,
    find_unused_parameters: bool = False, accumulate: int = 1, clip_grad: float | None = None,
    comm_hook: str | Callable[..., Any] | None = None, powersgd_rank: int = 4,
    sync_batchnorm: bool = True, autocast: bool = False, compile: str | None = None,
) -> DDP:  # fmt: skip
    """Wrap `model` in DistributedDataParallel over the mesh's axis "dp".

    `comm_hook` is a name of comm_hooks.NAMES or a function (state, bucket) -> Future.
    """
    if isinstance(comm_hook, str) and comm_hook not in comm_hooks.NAMES:
        raise base.StrategyError(
            f"comm_hook={comm_hook!r} is not one of {', '.join(comm_hooks.NAMES)} or None"
        )
    place, device = base.axis(mesh, "dp"), base.this_device(mesh)
    model = ddp_wrap.prepare(model, place, device, sync_batchnorm)
    if compile is not None:
        model.compile(backend=compile)
    wrapped = ddp_wrap.wrap(
        model, place, device, sync_batchnorm,
        bucket_cap_mb=bucket_cap_mb,
        gradient_as_bucket_view=gradient_as_bucket_view,
        static_graph=static_graph,
        find_unused_parameters=find_unused_parameters,
    )  # fmt: skip
    if isinstance(wrapped, DistributedDataParallel):
        if isinstance(comm_hook, str):
            comm_hooks.register(wrapped, comm_hook, place.group, powersgd_rank)
        elif comm_hook is not None:
            wrapped.register_comm_hook(place.group, comm_hook)
    return DDP(
        wrapped, make_optimizer(model.parameters()), loss, place, device, model,
        accumulate=accumulate, clip_grad=clip_grad, autocast=autocast,
        sync_first=static_graph,  # a static graph is recorded in a backward pass that sends
    )  # fmt: skip


STRATEGY = base.Strategy(
    name="ddp",
    title="DistributedDataParallel",
    axes=("dp",),
    build=build,
    reasons_against=base.too_few_samples,
    knobs={
        "bucket_cap_mb": "MiB of gradients per bucket (default 25; the first bucket has 1)",
        "gradient_as_bucket_view": "gradients live in the buckets: one copy less",
        "static_graph": "the same parameters get gradients in every step",
        "find_unused_parameters": "some parameters may get no gradient",
        "accumulate": "microbatches per optimiser step, sent once",
        "clip_grad": "largest global gradient norm",
        "comm_hook": "fp16, bf16, powersgd or noop (noop trains wrongly: for measuring)",
        "powersgd_rank": "rank of PowerSGD's factors",
        "sync_batchnorm": "BatchNorm over the batch of all ranks",
        "autocast": "forward in bfloat16 where that is safe",
        "compile": "torch.compile's backend",
    },
    lesson="04_ddp",
)
