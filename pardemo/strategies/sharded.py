"""Fully sharded training, on one axis (fsdp) or two (hsdp): what both strategies share."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from pardemo.strategies import base, batchnorm, routing, units

KNOBS = {
    "reshard_after_forward": "free a unit's parameters after its forward and gather them again",
    "mixed_precision": '"bf16": compute and gather in bfloat16, reduce and keep in float32',
    "offload": "keep shards and optimiser state in CPU memory",
    "prefetch": "how many units ahead are gathered explicitly (0: FSDP's own order)",
    "accumulate": "microbatches per optimiser step, reduced once",
    "checkpoint": '"full" or "selective" activation checkpointing of every unit',
    "clip_grad": "largest global gradient norm",
    "units": "names of the modules to gather one at a time (None: found by themselves)",
}


@dataclass(frozen=True)
class Choices:
    """The knobs that fsdp and hsdp share; KNOBS says what each does."""

    reshard_after_forward: bool = True
    mixed_precision: str | None = None
    offload: bool = False
    prefetch: int = 0
    accumulate: int = 1
    checkpoint: str | None = None
    clip_grad: float | None = None
    units: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.mixed_precision not in (None, "bf16"):
            raise base.StrategyError(f'mixed_precision is "bf16", not {self.mixed_precision!r}')


class Sharded(base.Step):
    """Train a module that `fully_shard` has split over the axes in `axes`, outermost first."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: base.Loss,
        device: torch.device, axes: Sequence[base.Axis], choices: Choices,
    ) -> None:  # fmt: skip
        super().__init__(model, optimizer)
        self.loss, self.device, self.axes, self.choices = loss, device, axes, choices
        self.place = base.Axis()  # among all ranks that share the batch
        for axis in axes:
            rank = self.place.rank * axis.size + axis.rank
            self.place = base.Axis(self.place.size * axis.size, rank)

    def step(self, batch: Any) -> torch.Tensor:
        """Forward and backward gather each unit and reduce-scatter its gradients; then update."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        parts = base.microbatches(batch, self.place, self.choices.accumulate)
        total = torch.zeros((), device=self.device)
        for i, (part, weight) in enumerate(parts):
            if isinstance(self.model, FSDPModule):
                last = i == len(parts) - 1
                self.model.set_requires_gradient_sync(last)  # reduce once, after the last
                self.model.set_is_last_backward(last)
            value = self._loss(part) * weight
            (value * self.place.size).backward()  # FSDP divides the sum over ranks by their number
            total = total + value.detach()
        self._reduce_scalars()
        if self.choices.clip_grad is not None:
            self._clip(self.choices.clip_grad)
        self.optimizer.step()
        return self._sum(total)

    def state(self) -> base.State:
        """Gather every shard; the same full state dict on every rank."""
        return base.to_cpu({key: self._full(v) for key, v in self.model.state_dict().items()})

    @torch.no_grad()
    def load(self, state: base.State) -> None:
        """Every rank takes its own shard out of the full state dict; nothing is sent."""
        own = self.model.state_dict()
        wrong = sorted(set(own) ^ set(state))
        if wrong:
            raise base.StrategyError(f"{len(wrong)} keys of the state dict differ: {wrong[:4]}")
        for key, value in own.items():
            full = state[key].to(value.device)
            if isinstance(value, DTensor):
                full = distribute_tensor(
                    full, value.device_mesh, value.placements, src_data_rank=None
                )
            value.copy_(full)

    def _loss(self, part: Any) -> torch.Tensor:
        inputs, targets = base.to_device(part, self.device)
        cast: Any = contextlib.nullcontext()
        if self.choices.mixed_precision and not isinstance(self.model, FSDPModule):
            cast = torch.autocast(self.device.type, torch.bfloat16)
        try:
            with cast:
                return self.loss(base.call(self.model, inputs), targets)
        except RuntimeError as error:
            if "mixed torch.Tensor and DTensor" not in str(error):
                raise
            raise base.StrategyError(
                "a unit's parameters were used outside its forward, where they are not gathered: "
                f"choose other units with units=[...], or units=[] for the root alone ({error})"
            ) from error

    def _sum(self, value: torch.Tensor) -> torch.Tensor:
        for axis in self.axes:
            value = base.reduce_sum(value, axis.group)
        return value

    def _full(self, value: torch.Tensor) -> torch.Tensor:
        if not isinstance(value, DTensor):
            return value
        gathered: torch.Tensor = value.to(self.device).full_tensor()  # type: ignore[attr-defined]
        return gathered  # moved (n-1)/n * bytes of value, padded

    def _reduce_scalars(self) -> None:
        """Average the gradients that FSDP leaves alone: parameters without a dim to split."""
        if isinstance(self.model, FSDPModule):
            for parameter in self.model.parameters():
                if not isinstance(parameter, DTensor) and parameter.grad is not None:
                    parameter.grad.copy_(self._sum(parameter.grad) / self.place.size)

    @torch.no_grad()
    def _clip(self, max_norm: float) -> None:
        """Scale by the norm of the whole gradient, not of this rank's shard."""
        split, whole = (torch.zeros((), dtype=torch.float64) for _ in range(2))
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        for grad in grads:
            if isinstance(grad, DTensor):
                split += grad.to_local().double().square().sum().cpu()
            else:
                whole += grad.double().square().sum().cpu()
        if isinstance(self.model, FSDPModule):
            split = base.reduce_sum(split.to(self.device), self.axes[-1].group).cpu()  # one number
        scale = (max_norm / ((split + whole).sqrt() + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(scale.to(grad.device))


def shard(
    model: nn.Module, make_optimizer: base.MakeOptimizer, loss: base.Loss,
    mesh: DeviceMesh | None, names: Sequence[str], choices: Choices,
) -> Sharded:  # fmt: skip
    """Split `model` over the mesh axes `names` (last: shards; first of two: replicas)."""
    device = base.this_device(mesh)
    axes = [base.axis(mesh, name) for name in names]
    model = model.to(device)
    for axis in reversed(axes):
        base.broadcast_module(model, axis.group)
    model = _global_batchnorm(model, axes, device)
    routing.synchronise(model, _together(axes))
    parts = units.find(model, choices.units)
    if choices.checkpoint is not None:
        units.recompute(parts, choices.checkpoint)
    if mesh is not None and any(axis.size > 1 for axis in axes):
        used = [name for name, axis in zip(names, axes, strict=True) if axis.size > 1]
        whole = [names[-1]] if used == [names[-1]] else list(names)
        _fully_shard(model, [unit for _, unit in parts], mesh[tuple(whole)], choices)
    return Sharded(model, make_optimizer(model.parameters()), loss, device, axes, choices)


def _together(axes: Sequence[base.Axis]) -> dist.ProcessGroup | None:
    """One group of all ranks that share the batch; None at degree 1."""
    groups = [axis.group for axis in axes if axis.group is not None]
    if len(groups) < 2:
        return groups[0] if groups else None
    return dist.group.WORLD  # two axes of a mesh over all ranks


def _global_batchnorm(
    model: nn.Module, axes: Sequence[base.Axis], device: torch.device
) -> nn.Module:
    """Statistics over the batch of all ranks, on one axis or over several, one after the other."""
    groups = [axis.group for axis in axes if axis.group is not None]
    if len(groups) < 2:
        return batchnorm.synchronise(model, groups[0] if groups else None, device)

    def add_up(vector: torch.Tensor) -> torch.Tensor:
        for group in groups:
            dist.all_reduce(vector, group=group)  # moves 2(n-1)/n * its bytes
        return vector

    return batchnorm.replace(model, lambda old: batchnorm.RankBatchNorm(old, add_up))


def _fully_shard(model: nn.Module, parts: list[Any], mesh: DeviceMesh, choices: Choices) -> None:
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
    settings: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": _precision(choices, output=False),
        "offload_policy": offload if choices.offload else OffloadPolicy(),
        "ignored_params": {p for p in model.parameters() if p.ndim == 0},  # FSDP refuses these
    }
    if choices.mixed_precision:
        policy = MixedPrecisionPolicy(cast_forward_inputs=False, output_dtype=torch.bfloat16)
        settings_norm = settings | {"mp_policy": policy}
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module not in parts:
                fully_shard(module, **settings_norm)  # its statistics stay in float32
    for unit in parts:
        fully_shard(unit, reshard_after_forward=choices.reshard_after_forward, **settings)
        units.take_no_views(unit)
    settings["mp_policy"] = _precision(choices, output=True)
    fully_shard(model, reshard_after_forward=False, **settings)  # its backward comes first
    for i, unit in enumerate(parts) if choices.prefetch else ():
        unit.set_modules_to_forward_prefetch(parts[i + 1 : i + 1 + choices.prefetch])
        before = parts[max(0, i - choices.prefetch) : i]
        unit.set_modules_to_backward_prefetch(before[::-1])


def _precision(choices: Choices, output: bool) -> MixedPrecisionPolicy:
    """Compute in bfloat16, reduce in float32; what leaves the model (`output`) is float32."""
    if choices.mixed_precision is None:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
        output_dtype=torch.float32 if output else None,
    )
