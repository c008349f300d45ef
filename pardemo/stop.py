"""Signals that end a command as Ctrl-C does."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

AGAIN_S = 25.0  # clearing away takes seconds: a stop that has not ended a command by then was lost


def is_command() -> bool:
    """Whether this process is `pardemo ...` or `python -m pardemo...`, asked while it starts."""
    program = os.path.basename(sys.argv[0])
    return program == "pardemo" or (program == "-m" and "pardemo" in " ".join(sys.orig_argv))


def while_loading() -> None:
    """From here to `main`, Ctrl-C ends a command at once: nothing has begun that wants an end, and
    a traceback through torch's imports says nothing."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if usual and is_command() and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _leave)


def loaded() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt, as ever."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(*_: Any) -> NoReturn:
    os.write(2, b"stopped\n")
    os._exit(128 + signal.SIGINT)


@contextlib.contextmanager
def stopped_by_signals(wanted: bool) -> Iterator[None]:
    """SIGTERM and SIGHUP end a command as Ctrl-C does: its processes and files are cleared away.

    Python drops what is raised while an object is finalised, so the signal is sent once more.
    """
    waiting: list[threading.Timer] = []

    def stop(number: int, _: object) -> NoReturn:
        waiting.append(threading.Timer(AGAIN_S, os.kill, (os.getpid(), number)))
        waiting[-1].daemon = True
        waiting[-1].start()
        raise KeyboardInterrupt(number)

    here = threading.current_thread() is threading.main_thread()
    before = {}
    for number in (signal.SIGTERM, signal.SIGHUP) if wanted and here else ():
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for timer in waiting:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
