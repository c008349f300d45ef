"""Functions that fail on one rank, each in its own way; the rank at fault is given to them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from launch_hangs import (
    keeps_the_interpreter,
    rank,
    sleeps,
    stops_its_process,
    swallows_everything,
    wait_for_all,
    waits_elsewhere,
)


def raises_before(culprit: int) -> None:
    if rank() == culprit:
        raise ValueError("the planted error")
    wait_for_all()


def raises_between(culprit: int) -> None:
    for step in range(5):
        wait_for_all()
        if rank() == culprit and step == 2:
            raise ValueError("the planted error")


def raises_inside(culprit: int) -> None:
    wait_for_all()
    dist.all_reduce(["not a tensor"] if rank() == culprit else torch.ones(4))


def raises_after(culprit: int) -> None:
    wait_for_all()
    if rank() == culprit:
        raise ValueError("the planted error")


def raises_late_with_connections_closed(culprit: int) -> None:
    wait_for_all()
    if rank() == culprit:
        dist.destroy_process_group()
        time.sleep(0.2)
        raise ValueError("the planted error")
    wait_for_all()


class _Awkward(Exception):
    """Cannot be pickled, cannot be rebuilt from its args, cannot be shown."""

    def __init__(self, a: int, b: int) -> None:
        self.lock = threading.Lock()

    def __str__(self) -> str:
        raise ZeroDivisionError("no text")


def raises_awkwardly(culprit: int) -> None:
    if rank() == culprit:
        raise _Awkward(1, 2)
    wait_for_all()


class _Leaves(Exception):
    """Ends the program when it is shown."""

    def __str__(self) -> str:
        sys.exit(1)


def raises_what_exits_when_shown(culprit: int) -> None:
    if rank() == culprit:
        raise _Leaves
    wait_for_all()


def raises_without_a_stream(culprit: int) -> None:
    if rank() == culprit:
        sys.stdout = sys.stderr = None  # type: ignore[assignment]
        raise ValueError("the planted error")
    wait_for_all()


def raises_outside_its_group(culprit: int) -> None:
    if rank() == culprit:
        os.setpgid(0, os.getpgid(os.getppid()))
        raise ValueError("the planted error")
    wait_for_all()


def becomes_another_program(culprit: int) -> None:
    if rank() == culprit:
        os.execv("/bin/sleep", ["sleep", "60"])
    wait_for_all()


def writes_into_every_descriptor(culprit: int) -> None:
    """Into the rank's own connection too, where it is not a message."""
    if rank() == culprit:
        for fd in range(3, 64):
            with contextlib.suppress(OSError):
                os.write(fd, b"\xff" * 64)
        time.sleep(60)
    wait_for_all()


def exits_0(culprit: int) -> None:
    if rank() == culprit:
        sys.exit(0)
    wait_for_all()


def exits_hard_0(culprit: int) -> None:
    if rank() == culprit:
        os._exit(0)
    wait_for_all()


def exits_hard_3(culprit: int) -> None:
    wait_for_all()
    if rank() == culprit:
        os._exit(3)
    wait_for_all()


def interrupts_itself(culprit: int) -> None:
    if rank() == culprit:
        raise KeyboardInterrupt
    wait_for_all()


def is_killed(culprit: int) -> None:
    wait_for_all()
    if rank() == culprit:
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for_all()


def is_killed_with_its_connection_closed(culprit: int) -> None:
    """As a process that the kernel kills: its files close before it counts as dead."""
    if rank() == culprit:
        for connection in psutil.Process().net_connections("unix"):
            socket.socket(fileno=connection.fd).shutdown(socket.SHUT_WR)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)


def segfaults(culprit: int) -> None:
    if rank() == culprit:
        ctypes.string_at(0)
    wait_for_all()


def runs_out_of_memory(culprit: int) -> None:
    if rank() == culprit:
        torch.empty(1 << 60)
    wait_for_all()


def returns_early(culprit: int) -> None:
    wait_for_all()
    if rank() != culprit:
        wait_for_all()


def returns_unsendable(culprit: int) -> object:
    wait_for_all()
    return (i for i in range(3)) if rank() == culprit else 1


def misses_a_module(culprit: int) -> None:
    if rank() == culprit:
        import no_such_module_anywhere  # noqa: F401
    wait_for_all()


def wraps_the_consequence(culprit: int) -> None:
    """The others turn their broken connection into an error of their own."""
    if rank() == culprit:
        os._exit(1)
    try:
        wait_for_all()
    except RuntimeError as error:
        raise ValueError("my peer is gone") from error


def speaks_of_connections(culprit: int) -> None:
    """The learner's own error has the words of a broken connection."""
    if rank() == culprit:
        raise RuntimeError("connection closed: the download timed out")


def reduces_another_shape(culprit: int) -> None:
    dist.all_reduce(torch.ones(8 if rank() == culprit else 4))  # does not fit, on purpose


def calls_another_collective(culprit: int) -> None:
    if rank() == culprit:
        dist.broadcast(torch.ones(4), src=0)  # the others reduce
    else:
        wait_for_all()
    wait_for_all()


def misses_the_barrier(culprit: int) -> None:
    if rank() == culprit:
        time.sleep(60)
    dist.monitored_barrier(timeout=timedelta(seconds=1))


@dataclass(frozen=True)
class Fault:
    """What to run and what must be said; `hangs` ones end by the timeout."""

    run: Callable[[int], object]
    says: str
    hangs: bool = False

    def __str__(self) -> str:
        return self.run.__name__


FAULTS = [
    Fault(raises_before, "ValueError: the planted error"),
    Fault(raises_between, "ValueError: the planted error"),
    Fault(raises_inside, "TypeError"),
    Fault(raises_after, "ValueError: the planted error"),
    Fault(raises_late_with_connections_closed, "ValueError: the planted error"),
    Fault(raises_awkwardly, "_Awkward"),
    Fault(raises_what_exits_when_shown, "_Leaves"),
    Fault(raises_without_a_stream, "ValueError: the planted error"),
    Fault(raises_outside_its_group, "ValueError: the planted error"),
    Fault(becomes_another_program, "closed or broke its connection"),
    Fault(writes_into_every_descriptor, "closed or broke its connection"),
    Fault(exits_0, "SystemExit: 0"),
    Fault(exits_hard_0, "status 0"),
    Fault(exits_hard_3, "status 3"),
    Fault(interrupts_itself, "KeyboardInterrupt"),
    Fault(is_killed, "SIGKILL"),
    Fault(is_killed_with_its_connection_closed, "SIGKILL"),
    Fault(segfaults, "SIGSEGV"),
    Fault(runs_out_of_memory, "RuntimeError"),
    Fault(returns_early, "returned while"),
    Fault(returns_unsendable, "generator"),
    Fault(misses_a_module, "ModuleNotFoundError"),
    Fault(wraps_the_consequence, "status 1"),
    Fault(speaks_of_connections, "RuntimeError: connection closed"),
    Fault(reduces_another_shape, "rank 1 called all_reduce(8 Float)"),
    Fault(calls_another_collective, "rank 1 called broadcast", hangs=True),
    Fault(misses_the_barrier, "did not reach the barrier"),
    Fault(sleeps, "did not come", hangs=True),
    Fault(keeps_the_interpreter, "did not come", hangs=True),
    Fault(stops_its_process, "process is stopped", hangs=True),
    Fault(waits_elsewhere, "collective number 1", hangs=True),
    Fault(swallows_everything, "did not come", hangs=True),
]
