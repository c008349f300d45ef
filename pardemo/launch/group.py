"""The kernel's side of one group of ranks: reads everything they say, always, in one thread.

A thread, because ranks also print between two cells, and a full pipe would block them. It only
collects; the caller's thread takes the events, prints and decides.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import queue
import selectors
import signal
import socket
import struct
import sys
import termios
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pardemo.launch import family, servers, spawned, watch, wire

_CHUNK_BYTES = 1 << 18
_STRAYS_S = 2.0  # for what ranks have left to be found and ended
_PF_EXITING = 0x4  # among the flags of /proc/PID/stat; linux/sched.h
_NO_SERVER = (
    "the process that forks ranks was ended from outside, and all ranks with it; "
    "the next launch starts another"
)


@dataclass(frozen=True)
class Event:
    """Something rank `rank` said or did: text (out, err, stacks), a message, or its end."""

    rank: int
    kind: str
    value: Any
    body: list[bytearray] | None = None


class Group:
    """`nprocs` rank processes, from their start to the death of the last one.

    `start` is "forkserver", "spawn", or a function that starts them elsewhere (a node of a lab).
    """

    def __init__(self, nprocs: int, start: str | Callable[[int], servers.Started]) -> None:
        self.nprocs, self.owner = nprocs, os.getpid()
        self.mark, self.spawned = uuid.uuid4().hex, start == "spawn"
        if callable(start):
            self.started = start(nprocs)
        else:
            fork = start == "forkserver"
            self.started = servers.fork_server().start(nprocs) if fork else spawned.spawn(nprocs)
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.pids = self.started.pids
        self.dead: dict[int, int] = {}
        self.ended = threading.Event()
        self.closing = False
        ends = self.started.ends
        self.channels = [wire.Channel(end.control) for end in ends]
        self.readers = [wire.Reader(end.control) for end in ends]
        for end in ends:
            watch.close_in_children(end.control)
        self._wake_r, self._wake_w = os.pipe()
        threading.Thread(target=self._pump, daemon=True, name="pardemo-pump").start()

    def limit_sends(self, seconds: float) -> None:
        """Give up a send to a rank that takes nothing for so long: it is stopped, or stuck."""
        limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        for channel in self.channels:
            channel.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def send(self, rank: int, kind: str, body: Sequence[wire.Part] = (), **meta: Any) -> bool:
        """Send to one rank; False if it did not take it in time.

        A rank that is gone is reported by its own event, not here.
        """
        try:
            self.channels[rank].send(kind, body, **meta)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def ask(self, rank: int) -> None:
        """Ask a rank where it is; one that has not read our last words is not asked again."""
        with contextlib.suppress(OSError):
            self.channels[rank].send("where", flags=socket.MSG_DONTWAIT)

    def signal(self, rank: int, signum: int) -> None:
        """Send a signal to one rank that is still alive."""
        if rank in self.pids and rank not in self.dead:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], signum)

    def state(self, rank: int) -> str:
        """The process state of a rank as /proc has it: R, S, D, T (stopped), Z, or "" if unknown;
        X for one that is ending, which /proc calls running while it closes its files."""
        try:
            text = Path(f"/proc/{self.pids[rank]}/stat").read_text()
        except (OSError, KeyError):
            return ""
        fields = text.rsplit(")", 1)[1].split()
        return "X" if int(fields[6]) & _PF_EXITING else fields[0]

    @property
    def alive(self) -> bool:
        """Whether every rank's process is."""
        return not self.closing and not self.dead and not self.ended.is_set()

    def kill(self) -> None:
        """Kill all ranks and what they started; returns when they are gone and all is closed."""
        if os.getpid() != self.owner:
            return  # a fork of the kernel that ends must not end the kernel's ranks
        self.closing = True
        self._kill_known()
        self.started.stop()
        with contextlib.suppress(OSError):
            os.write(self._wake_w, b"x")
        self.ended.wait(5.0)

    def _kill_known(self) -> None:
        for rank, pid in list(self.pids.items()):
            if rank not in self.dead:
                family.kill(pid)

    def _end_strays(self) -> None:
        """What the ranks have left, where no fork server is there to adopt it."""
        if sys.platform == "linux":
            pipes = [fd for end in self.started.ends for fd in (end.out, end.err, end.stacks)]
            family.end_strays(self.mark, pipes, _STRAYS_S)

    def _pump(self) -> None:
        """Read until every rank is gone and the group is being closed."""
        selector = selectors.DefaultSelector()
        for end in self.started.ends:
            selector.register(end.control, selectors.EVENT_READ, ("control", end))
            for name in ("out", "err", "stacks"):
                selector.register(getattr(end, name), selectors.EVENT_READ, (name, end))
        for fd in self.started.watch:
            selector.register(fd, selectors.EVENT_READ, ("watch", None))
        selector.register(self._wake_r, selectors.EVENT_READ, ("wake", None))
        try:
            while not (self.closing and len(self.dead) == self.nprocs):
                for key, _ in selector.select():
                    name, end = key.data
                    if not self._handle(name, end, key.fd):
                        selector.unregister(key.fileobj)
        finally:
            selector.close()
            self._close()

    def _handle(self, name: str, end: servers.RankEnd | None, fd: int) -> bool:
        """Read one descriptor; False when there will be no more from it."""
        if end is None:
            return self._read_deaths(fd) if name == "watch" else bool(os.read(fd, 16))
        if name == "control":
            return self._read_messages(end)
        return self._read_text(name, end, _CHUNK_BYTES)

    def _read_deaths(self, fd: int) -> bool:
        for rank, what, value in self.started.watch[fd]():
            if what == "pid":
                self.pids[rank] = value
            elif what == "exited":
                self._drain(self.started.ends[rank])
                self.dead[rank] = value
                self.events.put(Event(rank, "exited", value))
            elif what == "closed":  # the fork server is gone, and its ranks with it
                if not self.closing:
                    self.events.put(Event(-1, "error", _NO_SERVER))
                    self._kill_known()
                    self._end_strays()
                for missing in set(range(self.nprocs)) - set(self.dead):
                    self.dead[missing] = -signal.SIGKILL
                    self.events.put(Event(missing, "exited", -signal.SIGKILL))
                return False
            else:
                self.events.put(Event(rank, what, value))
        return True

    def _read_messages(self, end: servers.RankEnd) -> bool:
        reader = self.readers[end.rank]
        try:
            for message in reader.poll():
                if message.kind in ("returned", "raised"):
                    self._drain(end)
                self.events.put(Event(end.rank, message.kind, message.meta, message.body))
        except Exception:  # bytes that are no message may fail in any way
            reader.closed = True
        if reader.closed:
            self.events.put(Event(end.rank, "lost", None))
        return not reader.closed

    def _drain(self, end: servers.RankEnd) -> None:
        """Take what the rank had written before now: it goes before the message that follows."""
        for name in ("out", "err", "stacks"):
            waiting = array.array("i", [0])
            fcntl.ioctl(getattr(end, name), termios.FIONREAD, waiting)
            if waiting[0]:
                self._read_text(name, end, waiting[0])

    def _read_text(self, name: str, end: servers.RankEnd, size: int) -> bool:
        try:
            data = os.read(getattr(end, name), size)
        except BlockingIOError:
            return True
        if data:
            self.events.put(Event(end.rank, name, data))
        return bool(data)

    def _close(self) -> None:
        self.started.release()
        if self.spawned:
            self._end_strays()
        for end in self.started.ends:
            end.close()
        os.close(self._wake_r)
        os.close(self._wake_w)
        self.ended.set()
