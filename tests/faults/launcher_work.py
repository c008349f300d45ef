"""What the ranks of the launcher's faults run. Light to import: each rank does so anew."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import signal
import time
from multiprocessing import shared_memory
from pathlib import Path

import torch
import torch.distributed as dist


def total() -> float:
    value = torch.ones(3)
    dist.all_reduce(value)  # moves 12 bytes
    return value.sum().item()


def block(folder: str) -> None:
    """Say in `folder` that this rank runs; wait in gloo for a message that nobody sends."""
    Path(folder, f"rank-{dist.get_rank()}").touch()
    dist.recv(torch.ones(1), 1 - dist.get_rank())


def wait_and_sum(folder: str) -> float:
    """Say in `folder` that this rank runs; sum half a second later."""
    Path(folder, f"rank-{dist.get_rank()}").touch()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        time.sleep(0.05)
    return total()


def raises_at_a_step() -> None:
    for step in range(5):
        total()
        if dist.get_rank() == 1 and step == 3:
            raise ValueError("planted at step 3")


def returns_early() -> None:
    total()
    if dist.get_rank() == 0:
        total()


def other_shape() -> None:
    dist.all_reduce(torch.ones(4 + 4 * dist.get_rank()))  # does not fit, on purpose


def other_order() -> None:
    if dist.get_rank() == 1:
        dist.broadcast(torch.ones(4), src=1)  # while rank 0 reduces
    total()
    total()


def deaf_in_c() -> None:
    """Ignores SIGTERM, and sleeps in C with the interpreter's lock held."""
    if dist.get_rank() == 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ctypes.PyDLL(None).sleep(600)
    total()


def imports_for_ever() -> None:
    if dist.get_rank() == 1:
        import never_ready  # noqa: F401
    total()


def asks_for_too_much() -> None:
    if dist.get_rank() == 1:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + (200 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        torch.ones(1 << 30)
    total()


def many_sums() -> float:
    return sum(total() for _ in range(200))


def drags() -> None:
    while True:
        time.sleep(0.4 * dist.get_rank())
        total()


def start_daemon(folder: str, program: bool = False) -> None:
    """Start a process that leaves its session and its parent; it notes its number in `folder`.

    As another program it has nothing of this one's but its environment.
    """
    noted, note = os.pipe()
    middle = os.fork()
    if middle == 0:
        os.setsid()
        if os.fork() == 0:
            Path(folder, f"daemon-{os.getpid()}").touch()
            os.write(note, b"x")
            if program:
                os.closerange(0, 1000)
                os.execvp("sleep", ["sleep", "600"])
            time.sleep(600)
        os._exit(0)
    os.waitpid(middle, 0)
    assert os.read(noted, 1) == b"x"
    os.close(noted)
    os.close(note)


def leaves_a_daemon(folder: str, how: str) -> None:
    """Rank 1 leaves two daemons, and ends as `how` says."""
    if dist.get_rank() == 1:
        for program in (False, True):
            start_daemon(folder, program)
        if how == "dies":
            os._exit(1)
        if how == "raises":
            raise ValueError("planted")
    total()


def leaves_memory(how: str) -> list[str]:
    """Make shared memory and a semaphore of each kind that has a name, in rank 1 and in a child of
    it; end as `how` says. The names in /dev/shm that are there then."""
    torch.multiprocessing.set_sharing_strategy("file_system")
    kept: list[object] = []

    def make() -> None:
        kept.append(shared_memory.SharedMemory(create=True, size=4096))
        kept.append(multiprocessing.get_context("spawn").Semaphore())
        kept.append(torch.ones(1000).share_memory_())

    if dist.get_rank() == 1:
        make()
        if os.fork() == 0:
            make()
            os.kill(os.getpid(), signal.SIGKILL)
        os.wait()
        if how == "raises":
            raise ValueError("planted")
        if how == "dies":
            os._exit(1)
    total()
    return os.listdir("/dev/shm")


def values() -> torch.Tensor:
    total()
    print("said")
    return torch.ones(100_000)
