"""Signals that end a command as Ctrl-C does."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import NoReturn

AGAIN_S = 25.0  # clearing away takes seconds: a stop that has not ended a command by then was lost


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
