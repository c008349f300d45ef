"""Between a runner and its kernel, so that nothing a notebook started outlives either of them.

`python keeper.py FOLDER COMMAND...` runs the kernel and adopts every orphan below it (child
subreaper). When the kernel ends, however it ends, what does not end by itself soon is killed; when
the runner ends, killed or not, the kernel is killed too, and FOLDER, the runner's temporary one, is
removed. Run by its path, so that it starts without importing torch.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import NoReturn

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
PF_EXITING = 0x4  # among a process's flags; linux/sched.h
END_S = 10.0
GRACE_S = 1.5  # for a fork server to end its ranks, and remove what they leave on disk


def main(folder: str, command: list[str]) -> int:
    """Run `command`; returns its exit status, 128 + the signal for one that was killed."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, lambda *_: None)  # an interrupt is for the kernel, beside us
    runner, kernel = os.environ.get("JPY_PARENT_PID", ""), None
    try:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if runner and os.getppid() != int(runner):
            return 1  # the runner ended before it could be watched
        kernel = subprocess.Popen(
            command, env={**os.environ, "JPY_PARENT_PID": str(os.getpid())}, close_fds=False
        )
        while True:
            pid, status = os.wait()  # the kernel, or an orphan that came to us
            if pid == kernel.pid:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
    finally:
        if kernel is not None:
            kernel.kill()
        end_children()
        if runner and has_ended(int(runner)):
            shutil.rmtree(folder, ignore_errors=True)  # nobody else does


def _leave(*_: object) -> NoReturn:
    """Once only: as a runner of many threads dies, the signal comes for each thread that does."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(128 + signal.SIGTERM)


def end_children() -> None:
    """Wait until no child is left, nor theirs that come to us; after GRACE_S kill what there is."""
    began = time.monotonic()
    while (passed_s := time.monotonic() - began) < END_S:
        for pid in children() if passed_s > GRACE_S else ():
            os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.01)


def children() -> list[int]:
    """The processes whose parent this one is."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        fields = status(name)
        if fields and int(fields[1]) == os.getpid():
            found.append(int(name))
    return found


def has_ended(runner: int) -> bool:
    """Whether the runner is gone or going: its threads end one by one, and the first one tells."""
    fields = status(str(runner))
    return os.getppid() != runner or not fields or bool(int(fields[6]) & PF_EXITING)


def status(pid: str) -> list[str]:
    """The fields of /proc/PID/stat from the state on; none of a process that has ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rsplit(")", 1)[1].split()
    except OSError:
        return []


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2:]))
