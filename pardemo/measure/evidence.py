"""Who else used the cores: objective signs that a time was disturbed.

Linux only, from /proc; where a file is missing that sign is simply absent. None of it deletes a
sample: it labels, and it widens or refuses a ratio that others could have bent (timing.py).
"""

from __future__ import annotations

import functools
import os
import platform
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
SHORTEST_S = 0.2  # counters that tick 100 times a second say nothing about less
FORGIVEN = 0.05  # of a core: what a tick more or less looks like
WORTH_SAYING = 0.02  # share of the cores' time below which nothing is said


@dataclass(frozen=True)
class Look:
    """The machine's counters at one moment; the difference of two is what happened between.

    `busy_s` and `stolen_s` add up the cores this process may use: what ran on them, and what the
    hypervisor gave to other guests.
    """

    clock_s: float
    busy_s: float
    stolen_s: float

    def __repr__(self) -> str:
        return f"{self.busy_s:.1f} s busy, {self.stolen_s:.1f} s stolen since the machine started"


def look(cores: frozenset[int] | None = None) -> Look:
    """Read the counters of these cores (all that this process may use) now."""
    wanted = cores if cores is not None else frozenset(os.sched_getaffinity(0))
    busy = stolen = 0.0
    for line in _lines("/proc/stat"):
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in wanted:
            user, nice, system, _idle, _iowait, _irq, _softirq, steal = map(int, fields[:8])
            busy += (user + nice + system) / TICKS
            stolen += steal / TICKS
    return Look(time.perf_counter(), busy, stolen)


def own_cpu_s() -> float:
    """CPU seconds of this process and of its children that have ended (DataLoader workers)."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


@dataclass(frozen=True)
class Toll:
    """What ran on the cores during some work: core seconds; add tolls to pool several pieces.

    own_s is what the measured processes themselves used, so it is never held against them.
    """

    elapsed_s: float = 0.0
    busy_s: float = 0.0
    stolen_s: float = 0.0
    own_s: float = 0.0

    def __add__(self, other: Toll) -> Toll:
        return Toll(
            self.elapsed_s + other.elapsed_s,
            self.busy_s + other.busy_s,
            self.stolen_s + other.stolen_s,
            self.own_s + other.own_s,
        )

    def others(self) -> float:
        """Cores that other programs kept busy, on average."""
        if self.elapsed_s < SHORTEST_S:
            return 0.0
        return max(0.0, (self.busy_s - self.own_s) / self.elapsed_s)

    def displaced(self, wanted: float, cores: int) -> float:
        """Share of the `wanted` cores that other programs left no room for."""
        return max(0.0, wanted + self.others() - cores - FORGIVEN) / wanted

    def stolen(self, cores: int) -> float:
        """Share of the cores' time that the hypervisor took."""
        return self.stolen_s / self.elapsed_s / cores if self.elapsed_s >= SHORTEST_S else 0.0

    def taken(self, wanted: float, cores: int) -> float:
        """Share of the time of the wanted cores that somebody else had."""
        return min(1.0, self.displaced(wanted, cores) + self.stolen(cores))

    def reasons(self, wanted: float, cores: int) -> list[str]:
        """The same in words; empty where others took next to nothing."""
        said = []
        if self.displaced(wanted, cores) > WORTH_SAYING:
            said.append(
                f"other work kept {self.others():.2f} of {cores} cores busy while {wanted:g} were "
                "needed"
            )
        if self.stolen(cores) > WORTH_SAYING:
            said.append(f"the hypervisor took {self.stolen(cores):.0%} of the cores' time")
        return said


NO_TOLL = Toll()


@dataclass(frozen=True)
class Spent:
    """Looks at the machine around some work of a rank, and the CPU time it used meanwhile."""

    own_s: float
    before: Look
    after: Look
    host: str


def pooled(spent: Sequence[Spent]) -> Toll:
    """The toll as the first rank saw it; what all ranks of its machine used is their own."""
    first = spent[0]
    return Toll(
        first.after.clock_s - first.before.clock_s,
        first.after.busy_s - first.before.busy_s,
        first.after.stolen_s - first.before.stolen_s,
        sum(s.own_s for s in spent if s.host == first.host),
    )


@functools.cache
def host() -> str:
    """This machine, under one name in all its containers and namespaces."""
    return "".join(_lines("/proc/sys/kernel/random/boot_id")) or platform.node()


class Queue:
    """How long this thread waited for a core, was pushed off one, and worked.

    `read()` costs a few microseconds: one pread of an open /proc file and one getrusage.
    """

    def __init__(self) -> None:
        try:
            self._file = os.open(f"/proc/self/task/{_thread_id()}/schedstat", os.O_RDONLY)
        except OSError:  # kernels without schedstat: the sign is absent
            self._file = -1

    def read(self) -> tuple[int, int, int]:
        """(nanoseconds in the run queue, involuntary context switches, CPU nanoseconds) so far."""
        switches = resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
        return self.waited_ns(), switches, time.thread_time_ns()

    def waited_ns(self) -> int:
        """Nanoseconds in the run queue so far; of the thread that made this, read from any."""
        return int(os.pread(self._file, 80, 0).split()[1]) if self._file >= 0 else 0

    def close(self) -> None:
        """Close the file; reading afterwards reports no waiting."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _thread_id() -> int:
    import threading

    return threading.get_native_id()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
