"""Who else used the cores: objective signs that a time was disturbed.

Linux only, from /proc; where a file is missing that sign is simply absent. None of it deletes a
sample: it labels.
"""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Look:
    """The machine's counters at one moment; the difference of two is what happened between.

    `busy_s` and `stolen_s` add up the cores this process may use, `waited_s` is the time in which
    some task waited for a core (pressure stall information), None where the kernel has none.
    """

    clock_s: float
    busy_s: float
    stolen_s: float
    waited_s: float | None
    load: float

    def __repr__(self) -> str:
        return f"load {self.load:.2f}, {self.busy_s:.1f} s busy since the machine started"


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
    pressure = _lines("/proc/pressure/cpu")
    waited = float(pressure[0].rsplit("total=", 1)[1]) / 1e6 if pressure else None
    return Look(time.perf_counter(), busy, stolen, waited, os.getloadavg()[0])


def reasons(before: Look, after: Look, own_s: float, wanted: float, cores: int) -> list[str]:
    """Why times measured between two looks are contaminated, in words; empty when they are not.

    own_s: CPU seconds the measured processes themselves used; wanted: cores they need at once.
    Contaminated means that others left fewer cores than were needed (10 % of a core is forgiven,
    the clock ticks of /proc/stat are coarse), or that the hypervisor took more than 2 %.
    """
    elapsed = after.clock_s - before.clock_s
    if elapsed < 0.2:  # too short for counters that tick 100 times a second
        return []
    said = []
    others = max(0.0, (after.busy_s - before.busy_s - own_s) / elapsed)
    if wanted + others > cores + 0.1:
        said.append(
            f"other work kept {others:.2f} of {cores} cores busy while {wanted:g} were needed"
        )
    stolen = (after.stolen_s - before.stolen_s) / elapsed / cores
    if stolen > 0.02:
        said.append(f"the hypervisor took {stolen:.0%} of the cores' time")
    return said


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
        used = time.thread_time_ns()
        if self._file < 0:
            return 0, switches, used
        return int(os.pread(self._file, 80, 0).split()[1]), switches, used

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
