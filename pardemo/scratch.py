"""Temporary folders that do not stay: removed when they are done with, or by the next process.

A process that is killed with SIGKILL removes nothing. So each folder is locked by its owner (flock,
which the kernel frees when he dies, however he dies), and whoever makes one first removes those
that nobody has locked any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "pardemo-tmp-"
NAME = re.compile(r"(pardemo-tmp|pr)-\w{8}")
_locks: dict[str, int] = {}  # the descriptors that lock this process's folders


def name(prefix: str = PREFIX) -> Path:
    """A path in the temporary folder where nothing is yet, for `make`, here or elsewhere."""
    return Path(tempfile.gettempdir(), prefix + secrets.token_hex(4))


def make(named: Path | None = None) -> Path:
    """A new private folder at `named` (by default a new `name()`), locked until `remove`."""
    named, lock = named or name(), None
    while lock is None:
        named.mkdir(mode=0o700)
        try:
            lock = _locked(named)
        except BaseException:
            named.rmdir()
            raise
    _locks[str(named)] = lock
    return named


def _locked(path: Path) -> int | None:
    """Lock the folder just made; None where a sweep was quicker, and has removed it."""
    with contextlib.suppress(FileNotFoundError):
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
    return None


def remove(path: Path) -> None:
    """Remove a folder that `make` has made, here or elsewhere; one that is gone is no error."""
    if NAME.fullmatch(path.name) is None or not path.is_absolute():
        raise ValueError(f"{str(path)!r} is no folder of {__name__}'s making")
    shutil.rmtree(path, ignore_errors=True)
    if (lock := _locks.pop(str(path), None)) is not None:
        os.close(lock)


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A private folder for the time of a with block; what killed processes left is swept first."""
    sweep()
    made = make()
    try:
        yield made
    finally:
        remove(made)


def sweep() -> list[Path]:
    """Remove what killed processes of this user have left; the folders that were removed."""
    swept = list(abandoned(PREFIX))
    for path in swept:
        remove(path)
    return swept


def abandoned(prefix: str) -> Iterator[Path]:
    """Folders of that prefix whose owners have died; this process's from now on."""
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        if NAME.fullmatch(path.name) is None:
            continue
        with contextlib.suppress(OSError):  # its owner lives, or another process was quicker
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
                raise
            _locks[str(path)] = lock
            yield path
