"""The four phases of nn.DataParallel, timed and counted: on GPUs torch's, on a CPU our own.

On GPUs `GpuReplicas` is nn.DataParallel itself. Without GPUs nn.DataParallel does nothing: it calls
the module. `ThreadReplicas` goes through the same phases with replicas on the CPU, a thread each.
The backward pass is not parallel there: autograd has one queue per device, and the CPU is one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn as nn

from pardemo.strategies import base, batchnorm

PHASES = ("replicate", "scatter", "apply", "gather", "loss", "backward", "optimizer")


class Phases:
    """Seconds and bytes per phase of the last step; what stays on the root is not counted.

    `output_gradient_bytes` go the way of "gather" back in the backward pass.
    """

    def __init__(self, device: torch.device, timed: bool) -> None:
        self.device, self.timed = device, timed
        self.replicas = 1  # how many the last batch was dealt to
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, int] = {}
        self.output_gradient_bytes = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase, device included when `timed`: that costs the overlap, so it is a choice."""
        self.wait()
        start = time.perf_counter()
        yield
        self.wait()
        self.seconds[name] = time.perf_counter() - start

    def wait(self) -> None:
        if self.timed and self.device.type == "cuda":
            for index in range(torch.cuda.device_count()):
                torch.cuda.synchronize(index)

    def count(self, name: str, values: Sequence[Any]) -> None:
        """Note the bytes of what belongs to the replicas other than the root."""
        found: list[int] = []
        base.map_tensors(lambda t: _note(found, t), list(values[1:]))
        self.bytes[name] = sum(found)

    def count_outputs(self, outputs: Sequence[Any]) -> None:
        """The bytes that are gathered, and those of the gradients that backward sends out."""
        self.count("gather", outputs)
        found: list[int] = []
        base.map_tensors(lambda t: _note(found, t) if t.requires_grad else t, list(outputs[1:]))
        self.output_gradient_bytes = sum(found)


def _note(found: list[int], tensor: torch.Tensor) -> torch.Tensor:
    found.append(tensor.numel() * tensor.element_size())
    return tensor


class GpuReplicas(nn.DataParallel):
    """nn.DataParallel, with its four phases timed and their bytes counted."""

    phases: Phases
    meeting: batchnorm.Meeting | None = None

    def scatter(self, *args: Any) -> Any:
        """Split the inputs over the GPUs."""
        with self.phases.phase("scatter"):
            inputs, kwargs = super().scatter(*args)
        self.phases.count("scatter", list(zip(inputs, kwargs, strict=True)))  # one of them empty
        if self.meeting is not None:
            self.meeting.open(len(inputs))
        return inputs, kwargs

    def replicate(self, *args: Any) -> Any:
        """Copy the module to every GPU."""
        with self.phases.phase("replicate"):
            replicas = super().replicate(*args)
        self.phases.replicas = len(replicas)
        self.phases.bytes["replicate"] = (len(replicas) - 1) * model_bytes(self.module)
        return replicas

    def parallel_apply(self, *args: Any) -> Any:
        """Run every replica on its part, one thread each."""
        with self.phases.phase("apply"):
            return super().parallel_apply(*args)

    def gather(self, outputs: Any, output_device: Any) -> Any:
        """Fetch the outputs to the first GPU."""
        self.phases.count_outputs(outputs)
        with self.phases.phase("gather"):
            return super().gather(outputs, output_device)


class ThreadReplicas(nn.Module):
    """The phases of nn.DataParallel on one CPU: real copies, real threads, no device."""

    def __init__(self, module: nn.Module, devices: int, phases: Phases) -> None:
        super().__init__()
        self.module, self.devices, self.phases = module, devices, phases
        self.meeting: batchnorm.Meeting | None = None

    def forward(self, *args: Any, **named: Any) -> Any:
        """Scatter, replicate, apply in threads, gather."""
        with self.phases.phase("scatter"):
            parts = scatter(named or args, self.devices)
        self.phases.count("scatter", parts)
        with self.phases.phase("replicate"):
            copies = replicate(self.module, len(parts))
        self.phases.replicas = len(parts)
        self.phases.bytes["replicate"] = (len(parts) - 1) * model_bytes(self.module)
        if self.meeting is not None:
            self.meeting.open(len(parts))
        with self.phases.phase("apply"):
            outputs = apply_in_threads(copies, parts, self.meeting)
        self.phases.count_outputs(outputs)
        with self.phases.phase("gather"):
            return gather(outputs)


def model_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers, a shared one once."""
    tensors = dict.fromkeys([*module.parameters(), *module.buffers()])
    return sum(t.numel() * t.element_size() for t in tensors)


def scatter(inputs: Any, devices: int) -> list[Any]:
    """Parts of the inputs for at most `devices` replicas, in torch.chunk's sizes, as on GPUs.

    Seven samples on four devices are 2, 2, 2, 1, and five are 2, 2, 1: one device gets nothing.
    """
    size = -(-base.samples(inputs) // devices)
    starts = range(0, base.samples(inputs), size)
    parts = [base.map_tensors(partial(_slice, s, size), inputs) for s in starts]
    return [base.map_tensors(torch.clone, part) if i else part for i, part in enumerate(parts)]


def _slice(start: int, size: int, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[start : start + size]


def replicate(module: nn.Module, count: int) -> list[nn.Module]:
    """`count` copies of a module whose parameters are functions of the original's.

    A copy's parameters are clones that autograd tracks, so the backward pass sums the gradients of
    all copies into the original. The first copy shares the original's buffers, as on GPUs.
    """
    modules = list(module.modules())
    copies = []
    for index in range(count):
        tensors = {
            t: t.clone() if index else t.view_as(t)
            for t in dict.fromkeys([*module.parameters(), *module.buffers()])
        }
        made = {old: old._replicate_for_data_parallel() for old in modules}
        for old, new in made.items():
            new._former_parameters = {}  # type: ignore[assignment]
            for name, child in old._modules.items():
                setattr(new, name, None if child is None else made[child])
            for name, parameter in old._parameters.items():
                # a copy's parameter is no leaf, hence a plain attribute
                setattr(new, name, None if parameter is None else tensors[parameter])
            for name, buffer in old._buffers.items():
                if buffer is not None:
                    new._buffers[name] = buffer if index == 0 else tensors[buffer].detach()
        copies.append(made[module])
    return copies


def apply_in_threads(
    copies: Sequence[nn.Module], parts: Sequence[Any], meeting: batchnorm.Meeting | None = None
) -> list[Any]:
    """Run copy i on part i, its arguments, in thread i; a thread's first error is raised here."""
    outputs: list[Any] = [None] * len(copies)
    errors: list[BaseException] = []
    grad, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    def run(index: int) -> None:
        try:
            with torch.set_grad_enabled(grad), torch.autocast("cpu", enabled=autocast):
                outputs[index] = base.call(copies[index], parts[index])
        except BaseException as error:
            errors.append(error)
            if meeting is not None:
                meeting.abort()  # the others must not wait for this thread

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(copies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return outputs


def gather(outputs: Sequence[Any]) -> Any:
    """The outputs of all replicas as one, along dim 0."""
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        if not first.ndim:
            raise base.StrategyError(
                "every replica returns a number without a dimension, which cannot be put together "
                "along dim 0: return one per sample"
            )
        return torch.cat(list(outputs))
    if isinstance(first, dict):
        return {key: gather([out[key] for out in outputs]) for key in first}
    return type(first)(gather(list(column)) for column in zip(*outputs, strict=True))
