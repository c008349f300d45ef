"""A launch leaves nothing behind: no process, descriptor, file, thread or shared memory."""

from __future__ import annotations

import gc
import os
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from pardemo.launch import RankFailed, launch
from tests.faults.harness import strangers_hold

LAUNCHES = 50


def work(fails: bool) -> torch.Tensor:
    value = torch.ones(1000)
    dist.all_reduce(value)  # moves 4000 bytes
    print("said")
    if fails and dist.get_rank() == 1:
        os._exit(1)
    return value


def of_another(name: str) -> bool:
    """Whether a segment of /dev/shm is another program's, or has just gone."""
    return strangers_hold(name) or not Path("/dev/shm", name).exists()


def left_over() -> dict[str, int]:
    """What this process and its children hold, once the dust has settled."""
    deadline = time.monotonic() + 5.0
    gc.collect()  # what an earlier test left open until now is not a launch's
    here = psutil.Process()
    living = [p for p in here.children() if p.status() != psutil.STATUS_ZOMBIE]
    server = next(p for p in living if "pardemo.launch.zygote" in p.cmdline())
    while server.children() and time.monotonic() < deadline:
        time.sleep(0.05)
    temporary = Path(tempfile.gettempdir())
    return {
        "processes": len(here.children(recursive=True)),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "descriptors of the fork server": server.num_fds(),
        "threads": threading.active_count(),
        "native threads": here.num_threads(),
        "shared memory": len([n for n in os.listdir("/dev/shm") if not of_another(n)]),
        "temporary files": len([p for p in temporary.iterdir() if "pytorch" in p.name]),
    }


def test_fifty_launches_good_and_bad_leave_nothing_behind() -> None:
    for _ in range(2):
        launch(work, False, nprocs=2, echo=False)
    before = left_over()
    for i in range(LAUNCHES):
        fails = i % 5 == 0
        if fails:
            with pytest.raises(RankFailed):
                launch(work, True, nprocs=2, echo=False)
        else:
            launch(work, False, nprocs=2, echo=False)
    after = left_over()
    assert after == before
