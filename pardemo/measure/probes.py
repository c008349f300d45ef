"""Yardsticks that a watched rank measures after its training: what things take here at least."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

LONG = 256 * 1024  # bytes of the longer all-reduce
REPEATS = 7
MOST_ELEMENTS = 2**22  # of the parameters that AdamW is tried on


@dataclass(frozen=True)
class Wire:
    """An all-reduce in the group of the gradients: seconds of a short one, and per byte more."""

    latency_s: float
    per_byte_s: float

    def seconds(self, calls: float, size: float) -> float:
        """So many all-reduces that move so many bytes together."""
        return calls * self.latency_s + size * self.per_byte_s

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, device: torch.device) -> Wire | None:
        """Measure it (call it on every rank of the group); None where nobody is to talk to."""
        if not dist.is_initialized() or dist.get_world_size(group) < 2:
            return None
        if dist.get_backend(group) == "nccl" and device.type != "cuda":
            device = torch.device("cuda", torch.cuda.current_device())

        def taken(size: int) -> float:
            data = torch.zeros(size // 4, device=device)
            return _median(lambda: dist.all_reduce(data, group=group), device)

        short, long = taken(4), taken(LONG)
        return cls(short, max(0.0, long - short) / LONG)


@dataclass(frozen=True)
class AdamW:
    """torch.optim.AdamW on parameters like those of this run: seconds of one update."""

    seconds: float

    @classmethod
    def of(cls, shapes: Sequence[torch.Size]) -> AdamW | None:
        """Try it on copies of as many of the parameters as are cheap, and scale up."""
        some: list[torch.Tensor] = []
        for shape in shapes:
            if sum(p.numel() for p in some) + shape.numel() <= MOST_ELEMENTS:
                some.append(torch.zeros(shape))
        tried = sum(p.numel() for p in some)
        if not tried:
            return None
        for parameter in some:
            parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.AdamW(some)
        optimizer.step()
        taken = _median(optimizer.step, torch.device("cpu"))
        return cls(taken * sum(shape.numel() for shape in shapes) / tried)


def size_of(args: Any) -> int:
    """Bytes of the tensors among these arguments of a collective."""
    if isinstance(args, torch.Tensor):
        return args.numel() * args.element_size()
    return sum(map(size_of, args)) if isinstance(args, (list, tuple)) else 0


def _median(call: Callable[[], Any], device: torch.device) -> float:
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))
