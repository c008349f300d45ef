"""The machine card: what this machine is, how busy it is, and what it can and cannot show."""

from __future__ import annotations

import functools
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

BUSY_PSI = 10.0  # percent of the last 10 s in which some task waited for a core
_world: dict[str, Any] = {}  # the nodes this process's ranks are spread over, once they are known


@dataclass(frozen=True)
class Machine:
    """One machine at one moment; `str(machine)` is the card printed above every number.

    `devices` counts what a strategy may be spread over: GPUs where there are any, else cores.
    `load` is the 1-minute load average, `waiting` the share of the last 10 s (percent) in which
    some task waited for a core (Linux pressure stall information; None where the kernel has none).
    `nodes` are the cards of all nodes where torchrun or Slurm joined several, `elsewhere` the
    devices of those that are other machines than this one.
    """

    cpu: str
    cores: int
    memory_bytes: int
    load: float
    waiting: float | None
    python: str
    torch: str
    threads: int
    gpus: tuple[str, ...]
    links: str
    backend: str
    compiler: bool
    nodes: tuple[str, ...] = ()
    elsewhere: int = 0

    @property
    def devices(self) -> int:
        """Ranks that can run at the same time without sharing a device."""
        return (len(self.gpus) or self.cores) + self.elsewhere

    @property
    def device_type(self) -> str:
        """ "cuda" or "cpu": where ranks put their tensors."""
        return "cuda" if self.gpus else "cpu"

    @property
    def limits(self) -> list[str]:
        """What this machine cannot show, in words."""
        said = []
        if not self.gpus:
            said.append(
                "no GPU: ranks are CPU cores and gloo carries the data, so bytes, schedules, "
                "memory and correctness are real, and times are those of a CPU"
            )
        elif self.devices == 1:
            said.append("one GPU: no GPU-to-GPU transfer can be measured")
        said.append(
            f"{self.devices} device{'s' if self.devices > 1 else ''}: more ranks than that share "
            "devices; they show correctness and bytes, never a speed-up"
        )
        return said

    def trust(self) -> list[str]:
        """Reasons not to trust a time measured now; empty when there is none."""
        said = []
        if self.load > self.cores + 0.5:
            said.append(f"load {self.load:.1f} on {self.cores} cores: other work is running")
        if self.waiting is not None and self.waiting > BUSY_PSI:
            said.append(f"tasks waited for a core in {self.waiting:.0f} % of the last 10 s")
        return said

    def card(self) -> str:
        """The card as text: hardware, software, load, limits and warnings."""
        waiting = "" if self.waiting is None else f", tasks waiting {self.waiting:.0f} % of 10 s"
        lines = [
            f"CPU      {self.cpu}, {self.cores} cores, {self.memory_bytes / 1e9:.1f} GB",
            f"GPU      {', '.join(self.gpus) or 'none'}{'; ' + self.links if self.links else ''}",
            f"software torch {self.torch}, Python {self.python}, backend {self.backend}, "
            f"{self.threads} intra-op threads in this process",
            f"load     {self.load:.2f}{waiting}",
        ]
        if len(self.nodes) > 1:
            lines.append(f"nodes    {len(self.nodes)}, {self.devices} devices in all; this is one")
        lines += [f"limits   {said}" for said in self.limits]
        lines += [f"WARNING  {said}" for said in self.trust()]
        return "\n".join(lines)

    __str__ = __repr__ = card


def machine() -> Machine:
    """Look at this machine now: cores this process may use, load, memory, GPUs, backend.

    Never initialises CUDA where there is none; on GPU machines it only asks the driver.
    """
    gpus = _gpus()
    return Machine(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        load=os.getloadavg()[0],
        waiting=_waiting(),
        python=platform.python_version(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        gpus=gpus,
        links=_links(len(gpus)),
        backend="nccl" if gpus and dist.is_nccl_available() else "gloo",
        compiler=_has_compiler(),
        **_world,
    )


def spread_over(nodes: tuple[str, ...], elsewhere: int) -> None:
    """Tell this process's cards that ranks live on several nodes (see Machine)."""
    _world.update(nodes=nodes, elsewhere=elsewhere)


@functools.cache
def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _waiting() -> float | None:
    """`some avg10` of /proc/pressure/cpu, or None where the kernel does not keep it."""
    try:
        first = Path("/proc/pressure/cpu").read_text().splitlines()[0]
    except OSError:
        return None
    fields = dict(part.split("=") for part in first.split()[1:])
    return float(fields["avg10"])


def _gpus() -> tuple[str, ...]:
    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _links(gpus: int) -> str:
    """Which pairs of GPUs can copy to each other directly."""
    if gpus < 2:
        return ""
    pairs = [(a, b) for a in range(gpus) for b in range(a + 1, gpus)]
    direct = sum(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)
    return f"peer access between {direct} of {len(pairs)} pairs"


@functools.cache
def _has_compiler() -> bool:
    """Whether torch.compile's default backend has a C++ compiler to call."""
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))
