"""One live line per run: what the ranks last reported, and a clean last state in the saved file."""

from __future__ import annotations

import sys
import time
from typing import Any

from pardemo.launch.servers import in_kernel

_EVERY_S = 0.2


class Live:
    """Shows reports of a run's ranks: a display that is updated in a notebook, a line elsewhere."""

    def __init__(self, nprocs: int) -> None:
        self.nprocs = nprocs
        self.newest: dict[int, dict[str, Any]] = {}
        self.first: dict[int, dict[str, Any]] = {}
        self._shown_at = 0.0
        self._handle: Any = None
        self._on_line = False

    def update(self, rank: int, values: dict[str, Any]) -> None:
        """Take a rank's report; show it if the last one shown is old enough."""
        self.first.setdefault(rank, values)
        self.newest[rank] = values
        if time.monotonic() - self._shown_at >= _EVERY_S:
            self._shown_at = time.monotonic()
            self._show(self.text())

    def clear(self) -> None:
        """Before other text is printed: leave the terminal's line."""
        if self._on_line:
            sys.stdout.write("\r\x1b[K")
            self._on_line = False

    def finish(self, how: str = "done") -> None:
        """Show the last state, for good; nothing if no rank reported."""
        if self.newest:
            self._show(f"{self.text()}, {how}", last=True)
            self.newest = {}

    def text(self) -> str:
        """The line: the step all ranks have reached, values as a range over ranks, the rate."""
        reports = list(self.newest.values())
        parts = []
        steps = [r["step"] for r in reports if "step" in r]
        if steps:
            parts.append(f"step {min(steps)}")
        names = [name for name in reports[0] if name not in ("at", "step")]
        parts += [_spread(name, [r[name] for r in reports if name in r]) for name in names]
        rate = self._rate()
        if rate:
            parts.append(f"{rate:.3g} steps/s")
        return f"{self.nprocs} ranks: {', '.join(parts)}"

    def _rate(self) -> float | None:
        """Steps per second of the slowest rank, from its first report to its newest."""
        rates = []
        for rank, newest in self.newest.items():
            first = self.first[rank]
            if "step" in newest and "step" in first and newest["at"] > first["at"]:
                rates.append((newest["step"] - first["step"]) / (newest["at"] - first["at"]))
        return min(rates) if rates else None

    def _show(self, text: str, last: bool = False) -> None:
        if in_kernel():
            from IPython.display import display

            data = {"text/plain": text}
            if self._handle is None:
                self._handle = display(data, raw=True, display_id=True)
            else:
                self._handle.update(data, raw=True)
        elif sys.stdout.isatty():
            sys.stdout.write(f"\r\x1b[K{text}" + ("\n" if last else ""))
            sys.stdout.flush()
            self._on_line = not last
        elif last:
            print(text)


def _spread(name: str, values: list[Any]) -> str:
    if not all(isinstance(v, int | float) for v in values):
        return f"{name} {values[0]}"
    low, high = min(values), max(values)
    shown = f"{low:.4g}" if f"{low:.4g}" == f"{high:.4g}" else f"{low:.4g} to {high:.4g}"
    return f"{name} {shown}"
