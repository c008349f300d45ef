"""The processes below one process, and how to end them all.

A process group is not enough: what a rank starts in a session of its own leaves the group, and what
outlives its parent leaves the tree. So every rank adopts the orphans below it (`adopt_orphans`, the
kernel's child subreaper), and the fork server those of a rank that has ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time

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
