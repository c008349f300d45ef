"""The link of a node lab: its rate and latency as checked values, and the `tc` lines that make it.

tbf (token bucket filter) limits what leaves an interface; it stands on both ends of every cable, so
that each direction has the rate (full duplex). netem delays packets where the kernel has it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pardemo.parameters import Refused

UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
BURST_S = 0.002  # of the rate may pass at once: less, and the kernel's timer would set the rate
QUEUE_MS = 50  # a packet that would wait longer is dropped, as a switch with a full queue does


@dataclass(frozen=True)
class Link:
    """How fast and how late: `rate_bits` per second and direction (None: unlimited), one way."""

    rate_bits: float | None = None
    latency_ms: float | None = None

    @property
    def bytes_per_s(self) -> float:
        """Bytes per second and direction, headers included; infinity where nothing limits it."""
        return float("inf") if self.rate_bits is None else self.rate_bits / 8

    @property
    def burst_bytes(self) -> int:
        """Bytes that pass at once after a pause, before the rate holds; 0 where nothing limits."""
        return 0 if self.rate_bits is None else max(16_000, int(self.bytes_per_s * BURST_S))

    def __repr__(self) -> str:
        rate = "unlimited" if self.rate_bits is None else f"{self.rate_bits / 1e6:,g} Mbit/s"
        return rate + (f", {self.latency_ms:g} ms one way" if self.latency_ms else "")

    def lines(self, device: str, latency: bool, fresh: bool = False) -> list[str]:
        """`tc` lines that shape what leaves `device`; with `latency`, delayed as well."""
        delayed = bool(latency and self.latency_ms)
        said = [] if fresh else [f"tc qdisc replace dev {device} root pfifo"]
        if self.rate_bits is not None:
            said.append(
                f"tc qdisc replace dev {device} root handle 1: tbf rate {self.rate_bits:.0f}bit "
                f"burst {self.burst_bytes} latency {QUEUE_MS}ms"
            )
        if delayed:
            parent = "root" if self.rate_bits is None else "parent 1:"
            said.append(
                f"tc qdisc replace dev {device} {parent} handle 10: "
                f"netem delay {self.latency_ms:g}ms limit 100000"
            )
        return said


def link(rate: str | float | None = None, latency_ms: float | None = None) -> Link:
    """A checked Link: rate as "100mbit", "2.5gbit", "unlimited", or bits per second.

    Raises Refused for anything else, and for a latency outside 0 to 1000 ms.
    """
    if latency_ms is not None:
        if not isinstance(latency_ms, (int, float)) or not 0 <= latency_ms <= 1000:
            raise Refused(f"latency must be 0 to 1000 ms, not {latency_ms!r}")
        latency_ms = float(latency_ms) or None
    return Link(_bits(rate), latency_ms)


def _bits(rate: str | float | None) -> float | None:
    if rate is None or rate == "unlimited":
        return None
    if isinstance(rate, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(kbit|mbit|gbit)", rate.strip().lower())
        if not match:
            raise Refused(
                f'a rate is a number and kbit, mbit or gbit ("100mbit"), or "unlimited"; '
                f"not {rate!r}"
            )
        rate = float(match[1]) * UNITS[match[2]]
    if isinstance(rate, bool) or not 1e5 <= float(rate) <= 4e11:
        raise Refused(f"a rate lies between 100 kbit and 400 gbit, not {rate!r} bit/s")
    return float(rate)
