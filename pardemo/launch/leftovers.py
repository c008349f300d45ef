"""What a killed rank leaves on disk and in shared memory, removed by whoever outlives it.

multiprocessing's own tracker would remove shared memory, but it is below the rank and ends with it.
So a rank notes the names in its group's folder as they are made, by itself or by what it forks.
"""

from __future__ import annotations

import _posixshmem
import contextlib
import functools
import os
from _multiprocessing import sem_unlink
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from pardemo import scratch

_PREFIX = "pr-"
_NOTES = "notes"
_REMOVE = {"shared_memory": _posixshmem.shm_unlink, "semaphore": sem_unlink}
_TORCHS = Path("/dev/shm")  # where torch's sharing strategy "file_system" keeps tensors


def name_folders(nprocs: int) -> list[str]:
    """For each rank a folder where multiprocessing keeps its sockets, to be made by the rank: who
    starts ranks may be killed before they look. A killed rank leaves it behind, so whoever outlives
    the group removes it; where nobody has, the next process does. Its name is shorter than
    multiprocessing's own: a socket's path may have 107 characters."""
    with contextlib.suppress(OSError):
        _sweep_once()
        return [str(scratch.name(_PREFIX)) for _ in range(nprocs)]
    return [""] * nprocs  # no temporary folder in this system


def make_folder(named: str) -> str:
    """Make the folder of that name; "" where it cannot be made."""
    if named:
        with contextlib.suppress(OSError):
            return str(scratch.make(Path(named)))
    return ""


@functools.cache  # in a process, before its first group
def _sweep_once() -> None:
    """Clear what groups of ranks have left that were killed with all their relatives."""
    for folder in scratch.abandoned(_PREFIX):
        clear(str(folder))


def note(folder: str) -> None:
    """From now on, note in `folder` the shared memory and semaphores that this process makes."""
    notes = Path(folder, _NOTES)

    def add(*words: object) -> None:
        with contextlib.suppress(OSError), notes.open("a") as file:
            file.write(" ".join(map(str, words)) + "\n")

    def opened(name: str, flags: int, *args: Any, **kwargs: Any) -> int:
        fd: int = open_(name, flags, *args, **kwargs)
        if flags & os.O_CREAT:  # who only attaches does not own it
            add("shared_memory", name)
        return fd

    def unlinked(name: str) -> None:
        unlink(name)
        add("gone", name)

    def told(tracker: Any, what: str, name: str, kind: str) -> None:
        if kind == "semaphore":
            add(kind if what == "REGISTER" else "gone", name)
        tell(tracker, what, name, kind)

    open_, unlink = _posixshmem.shm_open, _posixshmem.shm_unlink
    tell = resource_tracker.ResourceTracker._send  # type: ignore[attr-defined]
    _posixshmem.shm_open, _posixshmem.shm_unlink = opened, unlinked
    resource_tracker.ResourceTracker._send = told  # type: ignore[attr-defined]
    os.register_at_fork(after_in_child=lambda: add("process", os.getpid()))
    add("process", os.getpid())


def clear(*folders: str) -> None:
    """Remove what was noted in each folder and was not removed since, then it; "" is none."""
    for folder in filter(None, folders):
        _clear(folder)


def _clear(folder: str) -> None:
    made: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in Path(folder, _NOTES).read_text().splitlines():
            kind, name = line.split(" ", 1)
            made[name] = kind
    for name in (name for name, kind in made.items() if kind in _REMOVE):
        with contextlib.suppress(OSError):
            _REMOVE[made[name]](name)
    for file in _TORCHS.glob("torch_*_*") if made else ():  # torch_PROCESS_...
        if made.get(file.name.split("_")[1]) == "process":
            file.unlink(missing_ok=True)
    scratch.remove(Path(folder))
