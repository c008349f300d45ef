"""One timed run at a time on a machine: the second is told who holds the clock.

The lock is advisory (flock) on a private file of this user; the kernel frees it when its holder
dies, however it dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path


class Busy(RuntimeError):
    """Another process is timing right now."""


def lock_path() -> Path:
    """The lock file every pardemo of this user on this machine agrees on."""
    return Path(tempfile.gettempdir()) / f"pardemo-{os.getuid()}" / "timing.lock"


@contextlib.contextmanager
def timing(what: str, wait_s: float = 0.0, path: Path | None = None) -> Iterator[None]:
    """Hold the machine's clock for the body; Busy names the holder after `wait_s` seconds."""
    path = path or lock_path()
    handle = _open(path)
    try:
        until = time.monotonic() + wait_s
        while not _take(handle):
            if time.monotonic() >= until:
                raise Busy(
                    f"{_holder(handle)}; two timed runs at once would spoil each other: "
                    "wait for it to end, or stop it"
                )
            time.sleep(0.2)
        note = {"pid": os.getpid(), "what": what, "program": Path(sys.argv[0]).name}
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(note).encode(), 0)
        yield
        os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def holder(path: Path | None = None) -> str:
    """Who is timing now, as a sentence; "" when nobody is."""
    handle = _open(path or lock_path())
    try:
        return "" if _take(handle) else _holder(handle)
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    folder = path.parent.lstat()
    if not stat.S_ISDIR(folder.st_mode) or folder.st_uid != os.getuid():
        raise Busy(f"{path.parent} belongs to someone else; remove it to time on this machine")
    return os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _take(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(handle: int) -> str:
    try:
        note = json.loads(os.pread(handle, 4096, 0))
        return f"process {note['pid']} ({note['program']}) is timing {note['what']}"
    except (ValueError, KeyError):
        return "another process is timing"
