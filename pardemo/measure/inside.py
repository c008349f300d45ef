"""What runs inside a rank during a comparison: prepare, one shuffled round, clean up.

The driver (rounds.py) calls these on a warm group; the steps live in this module between calls.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from pardemo.measure.evidence import Queue, Spent, host, look, own_cpu_s
from pardemo.measure.gate import Gate

Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One variant of a comparison: how to build its step, on how many ranks and threads.

    `make(mesh)` runs once on each of the first `ranks` ranks and returns a function of no
    arguments: one step. `mesh` is a DeviceMesh over those ranks with axis "dp", or with the axes
    of `mesh={"pp": 2, "dp": 2}`; None for a single rank. It must use the mesh's groups, not the
    default group, when it takes fewer ranks than the session has.
    """

    make: Callable[[DeviceMesh | None], Step]
    ranks: int = 0
    threads: int = 1
    mesh: Mapping[str, int] | None = None
    label: str = ""

    def __post_init__(self) -> None:
        axes = dict(self.mesh or {})
        size = prod(axes.values())
        if self.ranks and axes and size != self.ranks:
            raise ValueError(f"mesh {axes} has {size} ranks, but ranks={self.ranks}")
        ranks = self.ranks or size
        if ranks < 1 or self.threads < 1:
            wanted = f"ranks={self.ranks}, threads={self.threads}"
            raise ValueError(f"a case needs at least 1 rank and 1 thread, got {wanted}")
        object.__setattr__(self, "ranks", ranks)
        object.__setattr__(self, "mesh", axes or {"dp": ranks})


@dataclass
class _Prepared:
    case: Case
    step: Step | None = None  # None on ranks that sit this one out
    gate: Gate = field(default_factory=lambda: Gate(None))
    cores: frozenset[int] = frozenset()


@dataclass
class _Session:
    prepared: dict[str, _Prepared]
    cores: dict[int, frozenset[int]]  # thread id -> affinity before the session
    threads: int
    all_cores: frozenset[int]


_sessions: dict[str, _Session] = {}


@dataclass(frozen=True)
class Taking:
    """How many samples of a variant to take in a round, and how many steps in a row are one."""

    samples: int
    steps: int = 1


@dataclass(frozen=True)
class Raw:
    """One rank's samples of one variant: lists of equal length; all but the start per step."""

    start_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)
    worked_s: list[float] = field(default_factory=list)
    switches: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Taken:
    """What a rank brings from one variant of one round."""

    warmup: Raw
    timed: Raw
    spent: Spent


def prepare(session: str, cases: dict[str, Case], warmup: int, pin: bool) -> dict[str, Raw]:
    """Build every case's step and warm it up; returns the (flagged) warm-up samples."""
    cores = sorted(os.sched_getaffinity(0))
    state = _Session({}, _affinities(), torch.get_num_threads(), frozenset(cores))
    _sessions[session] = state
    warm: dict[str, Raw] = {}
    for name, case in cases.items():
        mesh = _mesh(case)  # creates groups: every rank of the session takes part
        entry = _Prepared(case, cores=_share(case, cores, pin))
        state.prepared[name] = entry
        group = _group(case)
        if dist.get_rank() < case.ranks:
            entry.gate = Gate(group, len(cores))
            _settle(entry)
            entry.step = case.make(mesh)
            warm[name] = _iterate(entry, warmup)
        _wait_for_all()
    return warm


def run_round(
    session: str, order: list[str], plans: dict[str, Taking], warmup: int
) -> dict[str, Taken]:
    """Run the variants in this order; for each, `warmup` flagged steps and the timed samples."""
    state = _sessions[session]
    taken: dict[str, Taken] = {}
    for name in order:
        entry = state.prepared[name]
        if entry.step is not None:
            _settle(entry)
            before, used = look(state.all_cores), own_cpu_s()
            warm, plan = _iterate(entry, warmup), plans[name]
            timed = _iterate(entry, plan.samples, plan.steps)
            spent = Spent(own_cpu_s() - used, before, look(state.all_cores), host())
            taken[name] = Taken(warm, timed, spent)
        _wait_for_all()  # ranks that sat out slept here: gloo waits without spinning
    return taken


def finish(session: str) -> None:
    """Drop the steps; give threads and cores back as they were."""
    state = _sessions.pop(session, None)
    if state is None:
        return
    for entry in state.prepared.values():
        entry.gate.close()
    torch.set_num_threads(state.threads)
    rest = frozenset().union(*state.cores.values())
    for thread in _threads():
        _set_affinity(thread, state.cores.get(thread, rest))


def _iterate(entry: _Prepared, count: int, steps: int = 1) -> Raw:
    """`count` samples: barrier, clock, steps, clock. Nothing is gathered or synchronised inside."""
    raw, step, gate, queue = Raw(), entry.step, entry.gate, Queue()
    assert step is not None
    timed = _timed_cuda if torch.cuda.is_available() else _timed
    for _ in range(count):
        gate.wait()
        before = queue.read()
        start, wall = timed(step, steps)
        waited, switches, used = (b - a for a, b in zip(before, queue.read(), strict=True))
        raw.start_s.append(start)
        raw.wall_s.append(wall / steps)
        raw.waited_s.append(waited / steps / 1e9)
        raw.worked_s.append(used / steps / 1e9)
        raw.switches.append(switches)
    queue.close()
    return raw


def _timed(step: Step, steps: int) -> tuple[float, float]:
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return start, time.perf_counter() - start


def _timed_cuda(step: Step, steps: int) -> tuple[float, float]:
    """Events on the current stream, so that the launch of the kernels is not taken for the work."""
    torch.cuda.synchronize()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start = time.perf_counter()
    first.record()
    for _ in range(steps):
        step()
    last.record()
    torch.cuda.synchronize()
    return start, first.elapsed_time(last) / 1e3


def _mesh(case: Case) -> DeviceMesh | None:
    if case.ranks == 1:
        return None
    axes = dict(case.mesh or {})
    ranks = torch.arange(case.ranks).reshape(tuple(axes.values()))
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return DeviceMesh(kind, ranks, mesh_dim_names=tuple(axes))


def _group(case: Case) -> Any:
    """The group whose barrier starts an iteration: all ranks of the case, None for one rank."""
    if case.ranks == 1:
        return None
    if case.ranks == dist.get_world_size():
        return dist.group.WORLD
    return dist.new_group(list(range(case.ranks)))  # moves no data; every rank must call it


def _share(case: Case, cores: list[int], pin: bool) -> frozenset[int]:
    """The cores of this rank: `threads` of its own, or all when there are not enough."""
    wanted = case.ranks * case.threads
    if not pin or wanted > len(cores) or torch.cuda.is_available():
        return frozenset(cores)
    first = dist.get_rank() % case.ranks * case.threads
    return frozenset(cores[first : first + case.threads])


def _settle(entry: _Prepared) -> None:
    """Take the case's number of threads, all of them on the case's cores."""
    torch.set_num_threads(entry.case.threads)
    for thread in _threads():
        _set_affinity(thread, entry.cores)


def _threads() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/task")]


def _affinities() -> dict[int, frozenset[int]]:
    return {thread: frozenset(os.sched_getaffinity(thread)) for thread in _threads()}


def _set_affinity(thread: int, cores: frozenset[int]) -> None:
    try:
        os.sched_setaffinity(thread, cores)
    except ProcessLookupError:  # the thread ended between listing and setting
        return


def _wait_for_all() -> None:
    dist.barrier()  # moves no data
