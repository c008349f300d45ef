"""Gate: a barrier of ranks on one host that costs microseconds instead of a collective's latency.

A barrier before every sample keeps ranks in step, but gloo's takes as long as a small all-reduce:
a few percent of a short step. Here each rank counts up in its own line of shared memory and looks
at the others' until all have come. Between two looks it yields its core to whoever wants it (a
rank that still works may need it for its messages), but it stays awake: a core that sleeps wakes
up late, on a virtual machine above all, and the step after it is slower for that. It naps only
after PATIENCE_S, or where ranks share cores. When all have come they meet once more, awake, so
that all leave together. Ranks of several hosts fall back to the group's barrier.

A nap ends late by the thread's timer slack, 50 us unless the kernel is asked for less (prctl(2)):
a nap of 50 us took 134 us with it and 85 us without (tests/measure/small_messages.py; Linux 6.18).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
import time
from typing import Any

import torch.distributed as dist

LINE = 8  # 64-bit numbers between two ranks' counters: a cache line, so that none is shared
PATIENCE_S = 5e-3  # how long to stay awake between two looks
NAP_S = 5e-5
SET_TIMERSLACK, NO_SLACK_NS, DEFAULT_SLACK = 29, 1, 0  # PR_SET_TIMERSLACK of linux/prctl.h


class Gate:
    """Open it on every rank of `group` (None: one rank, a gate that is always open).

    `cores`: how many the ranks have between them, by default those this process may use.
    """

    def __init__(self, group: Any, cores: int | None = None) -> None:
        self._group, self._count = group, 0
        self._map = self._meet() if group is not None else None
        if self._map is not None:
            self._seen = memoryview(self._map).cast("q")
            self._mine = dist.get_rank(group) * LINE
            size = dist.get_world_size(group)
            self._others = [r * LINE for r in range(size) if r * LINE != self._mine]
            enough = size <= (cores or len(os.sched_getaffinity(0)))
            self._patience_s = PATIENCE_S if enough else 0.0
            _timer_slack(NO_SLACK_NS)

    @property
    def shared(self) -> bool:
        """Whether the ranks meet in shared memory, and not in a collective."""
        return self._map is not None

    def wait(self) -> None:
        """Return when every rank of the group has called this as often."""
        if self._map is None:
            if self._group is not None:
                dist.barrier(self._group)  # moves no data
            return
        self._gather(self._patience_s)
        self._gather(PATIENCE_S)

    def _gather(self, awake_s: float) -> None:
        """Count up, and wait for the others; after `awake_s` with naps between two looks."""
        self._count += 1
        self._seen[self._mine] = self._count
        since = 0.0
        for other in self._others:
            while self._seen[other] < self._count:
                since = since or time.perf_counter()
                if time.perf_counter() - since < awake_s:
                    os.sched_yield()
                else:
                    time.sleep(NAP_S)

    def close(self) -> None:
        """Give the memory back."""
        if self._map is not None:
            self._seen.release()
            self._map.close()
            self._map = None
            _timer_slack(DEFAULT_SLACK)

    def _meet(self) -> mmap.mmap | None:
        """Map rank 0's memory on all ranks; None where some rank cannot.

        It never has a name in a file system, so that a rank that is killed leaves none.
        """
        size, me = dist.get_world_size(self._group), dist.get_rank(self._group)
        length, file = size * LINE * 8, None
        names: list[Any] = [None]
        if me == 0:
            token = f"pardemo-gate-{secrets.token_hex(8)}"
            file = os.memfd_create(token)
            os.ftruncate(file, length)
            names = [(f"/proc/{os.getpid()}/fd/{file}", token)]
        dist.broadcast_object_list(names, group_src=0, group=self._group)  # moves one path
        path, token = names[0]
        found = _open(path, token, length)
        opened: list[Any] = [None] * size
        dist.all_gather_object(opened, found is not None, group=self._group)  # moves one truth each
        if file is not None:
            os.close(file)
        if all(opened):
            return found
        if found is not None:
            found.close()
        return None


def _timer_slack(nanoseconds: int) -> None:
    """How late this thread's naps may end; 0 gives back what it began with."""
    ctypes.CDLL(None).prctl(SET_TIMERSLACK, nanoseconds, 0, 0, 0)


def _open(path: str, token: str, length: int) -> mmap.mmap | None:
    """Map the memory of that token, unless this host has none there: rank 0 is on another one."""
    try:
        if token not in os.readlink(path):
            return None
        file = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        return mmap.mmap(file, length)
    finally:
        os.close(file)
