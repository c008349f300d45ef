"""Run a command inside a node: `python -I -S enter.py HOLDER_PID FLAGS FOLDER COMMAND...`.

Standard library only. It joins the holder's namespaces, runs the command as a child there, passes
signals on and ends as the command ended. When this process is killed, the command is killed too.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    holder, flags, folder, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:]
    try:
        opened = os.pidfd_open(holder)
    except ProcessLookupError:
        sys.exit(f"the node of process {holder} is gone: make a new lab")
    if libc.setns(opened, ctypes.c_int(flags)):
        sys.exit(f"cannot enter the node of process {holder}: {os.strerror(ctypes.get_errno())}")
    os.chdir(folder)
    child = os.fork()
    if child == 0:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        try:
            os.execvp(command[0], command)
        except OSError as error:
            print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
            os._exit(127)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(number, lambda got, _: os.kill(child, got))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (9, 19) else None
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
