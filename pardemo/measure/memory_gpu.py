"""The peak of one step on a GPU, as torch's allocator keeps it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn


def uses_gpu(model: nn.Module | None) -> bool:
    """Whether the step's tensors are the GPU's: ranks under gloo train on the CPU beside one."""
    there = torch.cuda.is_available()
    return there and (model is None or any(p.is_cuda for p in model.parameters()))


def on_gpu(step: Callable[[], object], snapshot: str | Path | None) -> tuple[int, str]:
    """The allocator's peak over one step, and its history where a path is given."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    if snapshot is not None:
        torch.cuda.memory._record_memory_history()
    try:
        step()
        torch.cuda.synchronize()
        if snapshot is not None:
            torch.cuda.memory._dump_snapshot(str(snapshot))
    finally:
        if snapshot is not None:
            torch.cuda.memory._record_memory_history(enabled=None)
    return torch.cuda.max_memory_allocated(), "the allocator's record"
