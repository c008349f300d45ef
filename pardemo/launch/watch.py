"""Guards around the moments in which the kernel must not be disturbed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class _Hold:
    """The handler of SIGINT while interrupts are held: notes one, or lets one through."""

    def __init__(self, before: Callable[[int, FrameType | None], Any]) -> None:
        self.before = before
        self.pressed = self.allowed = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if not self.allowed:
            self.pressed = True
            return
        self.allowed = False  # first: what the handler raises must find interrupts held again
        self.before(signum, frame)
        self.allowed = True


_hold: _Hold | None = None  # the main thread's


def _mine() -> _Hold | None:
    return _hold if threading.current_thread() is threading.main_thread() else None


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Put off a stop button pressed inside until `interrupts_allowed`, or the end; may be nested.

    Half a message, or a process started but not yet noted down, would be worse than a moment's
    delay. Does nothing in other threads, which no interrupt reaches, nor where SIGINT is ignored.
    """
    global _hold
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    if isinstance(before, _Hold):
        yield
        return
    hold = _Hold(before)
    signal.signal(signal.SIGINT, hold)
    _hold = hold
    stopped = False
    try:
        yield
    except KeyboardInterrupt as error:
        stopped = True  # raised anew: IPython fails to show a frame interrupted between two lines
        raise KeyboardInterrupt(*error.args) from None
    finally:
        _hold = None
        signal.signal(signal.SIGINT, before)
        if hold.pressed and not stopped:  # also over an error, which a loop might catch
            before(signal.SIGINT, None)


@contextlib.contextmanager
def interrupts_allowed() -> Iterator[None]:
    """Inside `interrupts_held`: here, where the kernel waits, an interrupt may end the wait.

    One does so at most, and what it raises is handled with interrupts held again.
    """
    hold = _mine()
    if hold is None:
        yield
        return
    hold.allowed = True
    try:
        if hold.pressed:
            hold.pressed = False
            hold(signal.SIGINT, None)
        yield
    finally:
        hold.allowed = False


_held: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def close_in_children(sock: socket.socket) -> None:
    """A process that the kernel forks must not keep this socket open when the kernel dies."""
    _held.add(sock)


def _close_held() -> None:
    for sock in list(_held):
        sock.close()


os.register_at_fork(after_in_child=_close_held)
