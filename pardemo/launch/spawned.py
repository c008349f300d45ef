"""Ranks started with torch.multiprocessing.spawn: slower, and wherever torch works."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing.connection as mpc
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing import spawn as spawning
from typing import Any

import torch.multiprocessing as mp

from pardemo.launch import family, leftovers
from pardemo.launch import rank as rank_module
from pardemo.launch.servers import Reading, Started, open_ends


def spawn(nprocs: int) -> Started:
    """Start `nprocs` ranks."""
    ends, theirs = open_ends(nprocs)
    connections = [[mpc.Connection(fd) for fd in fds] for fds in theirs]
    folders = leftovers.name_folders(nprocs)
    with _main_hidden(), _ended_with_this_process(), _deaf_to_ctrl_c():
        arguments = (connections, os.getpid(), folders)
        context = mp.spawn(_spawned, args=arguments, nprocs=nprocs, join=False)
    for connection in (c for row in connections for c in row):
        connection.close()
    processes = context.processes

    def died(rank: int) -> list[tuple[int, str, Any]]:
        code = processes[rank].exitcode
        if code is None:
            return []
        family.kill(processes[rank].pid)
        return [(rank, "exited", code)]

    def stop() -> None:
        for process in processes:
            with contextlib.suppress(ValueError):  # released meanwhile, by the thread that reads
                family.kill(process.pid)

    def release() -> None:
        for process, end in zip(processes, watched, strict=True):
            process.join()
            if end != process.sentinel:
                os.close(end)
            process.close()
        leftovers.clear(*folders)

    watched = [family.death_of(process) for process in processes]
    readings: dict[int, Reading] = {
        fd: functools.partial(died, rank) for rank, fd in enumerate(watched)
    }
    return Started(ends, readings, stop, release, {i: p.pid for i, p in enumerate(processes)})


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    """Keep new processes from running this process's script again: functions come by value."""
    main = vars(sys.modules["__main__"])
    hidden: dict[str, Any] = {
        name: main.pop(name) for name in ("__file__", "__spec__") if name in main
    }
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(hidden)


@contextlib.contextmanager
def _ended_with_this_process() -> Iterator[None]:
    """What is spawned here is killed when this process ends, from its first line on: for seconds it
    imports torch, and does not look at its connections yet."""
    usual = spawning.get_command_line

    def bound(**given: Any) -> list[str]:
        words = usual(**given)
        code = words.index("-c") + 1
        words[code] = family.bound_to(os.getpid()) + words[code]
        return words

    spawning.get_command_line = bound
    try:
        yield
    finally:
        spawning.get_command_line = usual


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """What is spawned here inherits that SIGINT is blocked, from before its first line: a terminal
    sends it to the whole group, and each would print where its import of torch was."""
    resource_tracker.ensure_running()  # first: as it starts, it lets SIGINT through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _spawned(rank: int, connections: list[list[Any]], kernel: int, folders: list[str]) -> None:
    """What torch.multiprocessing.spawn runs in each new process."""
    os.setpgid(0, 0)
    family.end_with_parent(False)  # from here on its connections say when the kernel has ended
    mp.set_start_method(None, force=True)  # DataLoader workers start as in any other process
    fds = []
    for index, row in enumerate(connections):
        for connection in row:
            if index == rank:
                fds.append(os.dup(connection.fileno()))
            connection.close()
    if os.getppid() != kernel:
        os._exit(1)
    rank_module.main(rank, *fds, folder=folders[rank])
