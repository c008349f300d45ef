"""Floating-point operations that really ran, the peak to set them beside, and the utilisation.

Counted with torch's FlopCounterMode (a multiply-add is 2), whose three traps are met here:
scaled_dot_product_attention counts nothing on a CPU, so it runs as plain matrix products while it
is counted; sharded tensors (DTensor) count the whole operation on every rank; and the fused
attention kernels of GPUs recompute in their backward, which counts as 5 products instead of 4.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Flops:
    """Operations of one step as counted on one rank, by operator, and what to beware of."""

    total: float
    by_operator: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __float__(self) -> float:
        return self.total

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} {value / 1e9:.4g}" for name, value in self.by_operator.items())
        said = "".join(f"; {note}" for note in self.notes)
        return f"{self.total / 1e9:.4g} GFLOP counted ({parts}){said}"


@dataclass(frozen=True)
class Peak:
    """The fastest matrix product measured here: FLOP/s of `threads` threads (or one GPU)."""

    flops_per_s: float
    size: int
    dtype: str
    threads: int
    device: str

    def __float__(self) -> float:
        return self.flops_per_s

    def __repr__(self) -> str:
        where = f"{self.threads} threads" if self.device == "cpu" else self.device
        return (
            f"{self.flops_per_s / 1e9:.4g} GFLOP/s measured: {self.dtype} product of "
            f"{self.size} x {self.size} matrices on {where}"
        )


@dataclass(frozen=True)
class Utilization:
    """Model FLOPs per second over the peak of all devices. Means nothing without `convention`."""

    flops: float
    step_s: float
    devices: int
    peak_flops_per_s: float
    convention: str

    @property
    def share(self) -> float:
        """Between 0 and 1, unless the count or the peak is wrong."""
        return self.flops / self.step_s / (self.devices * self.peak_flops_per_s)

    def __float__(self) -> float:
        return self.share

    def __repr__(self) -> str:
        doubt = "; above 1: the count or the peak is wrong" if self.share > 1 else ""
        return (
            f"MFU {self.share:.1%} ({self.convention}): {self.flops / 1e9:.4g} GFLOP in "
            f"{self.step_s * 1e3:.3g} ms on {self.devices} x "
            f"{self.peak_flops_per_s / 1e9:.4g} GFLOP/s{doubt}"
        )


def count_flops(step: Callable[[], object]) -> Flops:
    """Run `step` once and count its operations on this rank."""
    watch = _Watch()
    cpu = not torch.cuda.is_available()
    plain = sdpa_kernel(SDPBackend.MATH) if cpu else contextlib.nullcontext()
    with FlopCounterMode(display=False) as counter, plain, watch:
        step()
    counts = counter.get_flop_counts().get("Global", {})
    by_operator = {str(op).split(".")[-1]: float(n) for op, n in counts.items()}
    return Flops(float(counter.get_total_flops()), by_operator, tuple(watch.notes()))


class _Watch(TorchDispatchMode):
    """Lets sharded tensors unfold before they are counted, and notices recomputing kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.sharded = self.fused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.fused |= "attention_backward" in func._schema.name
        if any(issubclass(kind, DTensor) for kind in types):
            self.sharded = True
            return NotImplemented  # the tensor dispatches itself, and comes back with local parts
        return func(*args, **(kwargs or {}))

    def notes(self) -> list[str]:
        """What to beware of, in words."""
        said = []
        if self.sharded:
            said.append("of sharded tensors this rank's part: add ranks up for the whole")
        if self.fused:
            said.append("fused attention recomputes in backward: counted as 5 products, not 4")
        return said


def peak_flops(
    dtype: torch.dtype = torch.float32,
    sizes: tuple[int, ...] = (512, 1024, 2048),
    seconds: float = 0.3,
    threads: int | None = None,
) -> Peak:
    """The best rate of square matrix products here, with `threads` threads (default: as set).

    The largest over sizes of the fastest repetition: a peak is what the device can do, so this is
    the one place where a minimum of times is right.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        best = max((_rate(n, dtype, device, seconds / len(sizes)), n) for n in sizes)
    finally:
        torch.set_num_threads(before)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return Peak(best[0], best[1], str(dtype).removeprefix("torch."), threads or before, name)


def _rate(n: int, dtype: torch.dtype, device: str, seconds: float) -> float:
    """FLOP/s of the fastest n x n product within about `seconds`, after one warm-up."""
    a, b = (torch.rand(n, n, device=device).to(dtype) for _ in range(2))
    out = a @ b
    fastest, until = float("inf"), time.perf_counter() + seconds
    while fastest == float("inf") or time.perf_counter() < until:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        if device == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * n**3 / fastest
