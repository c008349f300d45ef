"""One process, several devices: torch's nn.DataParallel, and the same four phases on a CPU.

Split: the batch, along dim 0. Sent, every step, all of it by or to the first device, the root
(n devices, P parameters and buffers of b bytes): replicate copies the model n-1 times, (n-1) P b
bytes; scatter sends the other replicas their inputs; gather fetches their outputs; backward sends
the outputs' gradients out and sums (n-1) P b bytes of gradients on the root.
Memory: the root holds parameters, gradients, optimiser state, the whole batch and all outputs; the
others a copy of the parameters and their gradients. One Python process drives all devices, so its
lock is shared by them.

On GPUs this is nn.DataParallel itself; without GPUs, replicas in threads (replicas.py says how).
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh

from pardemo.strategies import base, batchnorm
from pardemo.strategies.replicas import GpuReplicas, Phases, ThreadReplicas


class DataParallel(base.Step):
    """One optimiser step over all devices of this process; the loss is taken on the root."""

    def __init__(
        self, model: nn.Module, plain: nn.Module, optimizer: torch.optim.Optimizer,
        loss: base.Loss, phases: Phases, devices: int, clip_grad: float | None,
    ) -> None:  # fmt: skip
        super().__init__(model, optimizer)
        self.plain, self.loss, self.phases = plain, loss, phases
        self.devices, self.clip_grad = devices, clip_grad

    def step(self, batch: Any) -> torch.Tensor:
        """The phases in turn; `phases` holds their seconds and bytes afterwards."""
        assert self.optimizer is not None
        base.take_shard(batch, 0, self.devices)  # refuses a batch too small to split
        inputs, targets = base.to_device(batch, self.phases.device)
        self.optimizer.zero_grad()
        output = base.call(self.model, inputs)
        with self.phases.phase("loss"):
            value = self.loss(output, targets)
        with self.phases.phase("backward"):
            value.backward()  # sums (n-1) * P gradients on the root
        self.phases.bytes["reduce"] = (self.phases.replicas - 1) * sum(
            p.grad.numel() * p.grad.element_size()
            for p in self.plain.parameters()
            if p.grad is not None
        )
        with self.phases.phase("optimizer"):
            base.clip_gradients(self.plain.parameters(), self.clip_grad)
            self.optimizer.step()
        return value.detach()

    def original(self) -> nn.Module:
        return self.plain


def build(
    model: nn.Module, make_optimizer: base.MakeOptimizer, loss: base.Loss,
    mesh: DeviceMesh | None = None, *, devices: int | None = None,
    clip_grad: float | None = None, sync_batchnorm: bool = True, timed: bool = True,
) -> DataParallel:  # fmt: skip
    """Spread each batch over `devices` devices of this process (default: all it has).

    `timed` waits for the GPUs at the end of every phase, so that `phases.seconds` means something.
    """
    device = base.this_device(mesh)
    on_gpus = device.type == "cuda"
    there = torch.cuda.device_count() if on_gpus else len(os.sched_getaffinity(0))
    devices = there if devices is None else devices
    if devices < 1 or (on_gpus and devices > there):
        raise base.StrategyError(
            f"devices={devices}, but this process has {there}: use 1 to {there}"
        )
    model = model.to(torch.device("cuda", 0) if on_gpus else device)
    meeting = None
    if devices > 1 and sync_batchnorm and batchnorm.has_batchnorm(model):
        meeting = batchnorm.Meeting()
        model = batchnorm.replace(model, lambda old: batchnorm.ThreadBatchNorm(old, meeting))
    phases = Phases(torch.device("cuda", 0) if on_gpus else device, timed)
    wrapped = model
    if devices > 1:
        wrapped = _wrap(model, devices, phases, meeting, on_gpus)
    optimizer = make_optimizer(model.parameters())
    return DataParallel(wrapped, model, optimizer, loss, phases, devices, clip_grad)


def _wrap(
    model: nn.Module, devices: int, phases: Phases, meeting: batchnorm.Meeting | None, on_gpus: bool
) -> nn.Module:
    wrapped: GpuReplicas | ThreadReplicas
    if on_gpus:
        wrapped = GpuReplicas(model, device_ids=list(range(devices)))
        wrapped.phases = phases
    else:
        wrapped = ThreadReplicas(model, devices, phases)
    wrapped.meeting = meeting
    return wrapped


STRATEGY = base.Strategy(
    name="data_parallel",
    title="nn.DataParallel",
    axes=(),
    build=build,
    reasons_against=base.too_few_samples,
    one_process=lambda knobs: True,
    knobs={
        "devices": "devices of this process (GPUs, else threads with a replica each)",
        "clip_grad": "largest global gradient norm",
        "sync_batchnorm": "BatchNorm over the whole batch",
        "timed": "wait for the GPUs after every phase, so that phases can be timed",
    },
    lesson="03_data_parallel",
)
