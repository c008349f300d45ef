"""Frames on a stream socket between the kernel and one rank: a small head, then bulk parts.

A frame is `count, length_0 .. length_count-1` (little-endian unsigned 64-bit) and then the parts.
Part 0 is the pickled head `(kind, meta)`; the other parts are opaque to this file. Keeping them
apart lets the receiver act on a message whose bulk it cannot unpickle, and lets tensors travel
without being copied into the pickle (pickle protocol 5, PEP 574).
"""

from __future__ import annotations

import pickle
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

_COUNT = struct.Struct("<Q")
_CHUNK_BYTES = 1 << 20

Part = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Message:
    """One frame: `kind` names it, `meta` holds small values, `body` the parts still pickled."""

    kind: str
    meta: dict[str, Any]
    body: list[bytearray]


class Channel:
    """The sending half of a connection; any thread may send, frames never interleave."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._lock = threading.Lock()

    def send(self, kind: str, body: Sequence[Part] = (), flags: int = 0, **meta: Any) -> None:
        """Send one frame and return once the peer's socket has taken it; OSError if it is gone.

        BlockingIOError if it took nothing for as long as SO_SNDTIMEO says, or, where `flags` has
        MSG_DONTWAIT, if it could not take a small frame at once.
        """
        head = pickle.dumps((kind, meta), protocol=5)
        parts: list[Part] = [head, *body]
        sizes = [memoryview(part).nbytes for part in parts]
        prefix = struct.pack(f"<{len(sizes) + 1}Q", len(sizes), *sizes)
        with self._lock:
            if sum(sizes) < _CHUNK_BYTES:
                self.sock.sendall(b"".join([prefix, *parts]), flags)
                return
            self.sock.sendall(prefix)
            for part in parts:
                self.sock.sendall(part)


@dataclass
class Reader:
    """The receiving half: feed it a readable socket, take whole messages out."""

    sock: socket.socket
    closed: bool = False
    _need: int = _COUNT.size
    _buffer: bytearray = field(default_factory=lambda: bytearray(_COUNT.size))
    _filled: int = 0
    _sizes: list[int] | None = None
    _parts: list[bytearray] = field(default_factory=list)
    _count: int | None = None

    def wait(self) -> Iterator[Message]:
        """Block for bytes and yield every message until the peer closes."""
        while not self.closed:
            yield from self.poll(flags=0, limit=1)

    def poll(self, flags: int = socket.MSG_DONTWAIT, limit: int = 64) -> list[Message]:
        """Read what is there (at most `limit` reads) and return the messages that are complete."""
        found: list[Message] = []
        for _ in range(limit):
            view = memoryview(self._buffer)[self._filled : self._need]
            try:
                got = self.sock.recv_into(view, 0, flags)
            except BlockingIOError:
                break
            except OSError:
                got = 0
            if got == 0:
                self.closed = True
                break
            self._filled += got
            while self._filled == self._need:
                message = self._advance()
                if message is not None:
                    found.append(message)
        return found

    def _expect(self, size: int) -> None:
        self._need, self._buffer, self._filled = size, bytearray(size), 0

    def _advance(self) -> Message | None:
        """Take the full buffer as the next field of the frame; the message if it was the last."""
        if self._count is None:
            (self._count,) = _COUNT.unpack(self._buffer)
            self._expect(8 * self._count)
            return None
        if self._sizes is None:
            self._sizes = list(struct.unpack(f"<{self._count}Q", self._buffer))
            self._expect(self._sizes[0])
            return None
        self._parts.append(self._buffer)
        if len(self._parts) < self._count:
            self._expect(self._sizes[len(self._parts)])
            return None
        kind, meta = pickle.loads(self._parts[0])
        message = Message(kind, meta, self._parts[1:])
        self._count, self._sizes, self._parts = None, None, []
        self._expect(_COUNT.size)
        return message
