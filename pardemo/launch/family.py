"""The processes below one process, and how to end them all.

A process group is not enough: what a rank starts in a session of its own leaves the group, and what
outlives its parent leaves the tree. So every rank adopts the orphans below it (`adopt_orphans`, the
kernel's child subreaper), and the fork server those of a rank that has ended. Where nobody was left
to adopt them, what still carries the group's mark, or a pipe that only its ranks had, is a stray.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from typing import Any

MARK = "PARDEMO_RANKS"  # a variable of ranks, and so of what they start: which group's it is
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def adopt_orphans() -> None:
    """From now on a process below this one whose parent ends becomes this one's child."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent(wanted: bool) -> None:
    """Whether this process is killed when the thread that started it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if wanted else 0)


def bound_to(pid: object) -> str:
    """Python text to begin a program with: it is killed when its parent, process `pid`, ends."""
    if sys.platform != "linux":
        return ""
    return (
        f"import ctypes, os; ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGKILL)}); "
        f"os.getppid() == {pid} or os._exit(1); "
    )


def children(pid: int) -> set[int]:
    """The processes whose parent is `pid`; empty where the system keeps no list of them."""
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children") as file:
                found.update(map(int, file.read().split()))
    return found


def descendants(pid: int) -> set[int]:
    """Children of `pid`, theirs, and so on."""
    found, new = set[int](), children(pid)
    while new - found:
        found |= new
        new = set().union(*map(children, new))
    return found


def kill(pid: int) -> None:
    """SIGKILL a process, all below it, and its process group; those that are gone are no error."""
    below, itself = [*descendants(pid)], [-pid, pid]  # a negative number is a process group
    for each in below + itself if pid == os.getpid() else itself + below:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(each, signal.SIGKILL)


def death_of(process: Any) -> int:
    """A descriptor that is readable when a process has ended. multiprocessing's own is a pipe that
    whatever the process forked holds open, so that a rank that left a daemon seemed to live."""
    try:
        return os.pidfd_open(process.pid)
    except (AttributeError, OSError):  # not on Linux
        return int(process.sentinel)


def end_strays(mark: str, pipes: list[int], within_s: float) -> None:
    """Kill processes that a group of ranks has left, once all its ranks have ended.

    Known by its mark in their environment, or by holding an end to write into one of `pipes` (of
    which this process has the other end). Other users' processes, and what has rid itself of both,
    stay.
    """
    wanted = f"{MARK}={mark}".encode()
    names = {os.readlink(f"/proc/self/fd/{fd}") for fd in pipes}
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        found = {int(name) for name in os.listdir("/proc") if name.isdecimal()} - {os.getpid()}
        strays = [pid for pid in found if _started_with(pid, wanted) or _writes_into(pid, names)]
        for pid in strays:
            with contextlib.suppress(OSError):  # it has just ended; it is not our child
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        if not strays:
            return


def _started_with(pid: int, variable: bytes) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        return variable in file.read().split(b"\0")
    return False


def _writes_into(pid: int, names: set[str]) -> bool:
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{fd}") in names:
                    with open(f"/proc/{pid}/fdinfo/{fd}") as file:
                        flags = next(line.split()[1] for line in file if line.startswith("flags"))
                    if int(flags, 8) & os.O_ACCMODE == os.O_WRONLY:
                        return True
    return False


def end_children(kept: set[int], within_s: float) -> None:
    """Kill and wait for this process's children but those `kept`, and what these leave to it."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        ended = 0
        for pid in children(os.getpid()) - kept:
            with contextlib.suppress(PermissionError):  # another user's: it stays
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                ended += 1
        if not ended:
            return
