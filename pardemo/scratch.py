"""Temporary folders that do not stay: removed at the end of their block, or by the next process.

A process that is killed with SIGKILL removes nothing. So each folder is locked by its owner (flock,
which the kernel frees when he dies, however he dies), and whoever makes one first removes those
that nobody has locked any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

NAME = re.compile(r"pardemo-tmp-\w{8}")
_UNBORN = "new-"  # before a folder's name: made, and not locked yet


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A private folder in the system's temporary one, for the time of a with block."""
    sweep()
    made = Path(tempfile.mkdtemp(prefix=f"{_UNBORN}pardemo-tmp-"))
    lock = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = made.rename(made.with_name(made.name.removeprefix(_UNBORN)))
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(lock)


def sweep() -> list[Path]:
    """Remove what killed processes of this user have left; the folders that were removed."""
    swept = []
    for path in Path(tempfile.gettempdir()).glob("pardemo-tmp-*"):
        if NAME.fullmatch(path.name) is None:
            continue
        with contextlib.suppress(OSError):  # another process may be quicker
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
                swept.append(path)
            except BlockingIOError:
                pass  # its owner lives
            finally:
                os.close(lock)
    return swept
