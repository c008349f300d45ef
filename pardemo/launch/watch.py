"""Guards around the moments in which the kernel must not be disturbed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import weakref
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Put off a stop button pressed inside until the end: half a message would be worse."""
    pressed: list[int] = []
    with _handler(pressed):
        yield
    if pressed:
        raise KeyboardInterrupt


@contextlib.contextmanager
def interrupts_dropped() -> Iterator[None]:
    """Ignore the stop button inside: it was pressed already, and this is what it asked for."""
    with _handler([]):
        yield


@contextlib.contextmanager
def _handler(pressed: list[int]) -> Iterator[None]:
    """Note interrupts instead of raising; in another thread than the main one none arrive."""

    def note(signum: int, frame: FrameType | None) -> None:
        pressed.append(signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_held: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def close_in_children(sock: socket.socket) -> None:
    """A process that the kernel forks must not keep this socket open when the kernel dies."""
    _held.add(sock)


def _close_held() -> None:
    for sock in list(_held):
        sock.close()


os.register_at_fork(after_in_child=_close_held)
