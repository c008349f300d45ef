"""report(): what a running rank tells the cell that started it."""

from __future__ import annotations

import time
from typing import Any

from pardemo.launch.wire import Channel

_EVERY_S = 0.1


class Reporter:
    """Sends a rank's newest report at most ten times a second, and the last one always."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.pending: dict[str, Any] | None = None
        self.sent_at = 0.0

    def put(self, values: dict[str, Any]) -> None:
        """Take a report; send it if the last one is old enough."""
        self.pending = {"at": time.monotonic(), **values}
        if time.monotonic() - self.sent_at >= _EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Send what is pending."""
        if self.pending is not None:
            self.channel.send("report", values=self.pending)
            self.pending, self.sent_at = None, time.monotonic()


_listener: Reporter | None = None  # set once in a rank's life, by rank.main


def listen(reporter: Reporter) -> None:
    """Route this process's reports to the kernel."""
    global _listener
    _listener = reporter


def in_rank() -> bool:
    """Whether this process is a rank that a kernel started."""
    return _listener is not None


def report(step: int | None = None, loss: float | None = None, **values: Any) -> None:
    """Show progress in the cell that started this rank; does nothing where no cell listens.

    Call it as often as you like. Values are numbers or short texts; a tensor's `.item()` is taken,
    which on a GPU waits for it.
    """
    if _listener is None:
        return
    given = {"step": step, "loss": loss, **values}
    plain = {k: v.item() if hasattr(v, "item") else v for k, v in given.items() if v is not None}
    _listener.put(plain)
