"""Rank output in the cell: whole lines, each with its rank, in the order each rank wrote them."""

from __future__ import annotations

import sys

_MAX_LINE_BYTES = 1 << 16


class Output:
    """Collects what ranks write and, if `echo`, prints it as `[rank 1] text`, whole lines only."""

    def __init__(self, nprocs: int, echo: bool) -> None:
        self.echo = echo
        self.chunks: list[list[bytes]] = [[] for _ in range(nprocs)]
        self._partial: dict[tuple[int, str], bytes] = {}

    def put(self, rank: int, name: str, data: bytes) -> None:
        """Take bytes that rank `rank` wrote to `name`, "out" or "err"."""
        self.chunks[rank].append(data)
        if not self.echo:
            return
        *lines, rest = (self._partial.pop((rank, name), b"") + data).split(b"\n")
        if len(rest) > _MAX_LINE_BYTES:
            lines, rest = [*lines, rest], b""
        if rest:
            self._partial[(rank, name)] = rest
        self._print(rank, name, lines)

    def flush(self) -> None:
        """Print the lines that did not end."""
        for (rank, name), rest in list(self._partial.items()):
            self._print(rank, name, [rest])
        self._partial.clear()

    def clear(self) -> None:
        """Forget what was kept, so that `text` is that of the next call."""
        self.chunks = [[] for _ in self.chunks]

    def tail(self, rank: int, size: int = 4096) -> str:
        """The last `size` bytes or a little more that a rank wrote."""
        newest: list[bytes] = []
        for chunk in reversed(self.chunks[rank]):
            newest.append(chunk)
            if sum(map(len, newest)) >= size:
                break
        return b"".join(reversed(newest))[-size:].decode("utf-8", "replace")

    def text(self) -> tuple[str, ...]:
        """Everything each rank wrote so far."""
        return tuple(b"".join(chunks).decode("utf-8", "replace") for chunks in self.chunks)

    def _print(self, rank: int, name: str, lines: list[bytes]) -> None:
        if not lines:
            return
        stream = sys.stdout if name == "out" else sys.stderr
        label = f"[rank {rank}] "
        stream.write("".join(f"{label}{_visible(line)}\n" for line in lines))
        stream.flush()


def _visible(line: bytes) -> str:
    """A line as a terminal would leave it: what follows the last carriage return."""
    return line.rstrip(b"\r").rsplit(b"\r", 1)[-1].decode("utf-8", "replace")
