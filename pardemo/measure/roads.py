"""Which network interface carried the ranks' bytes, and how fast each one between them would be.

What went where is read from the kernel's own count of every connection of this process (TCP_INFO).
Where two machines share several networks, each is tried with a short transfer, because the speed
that an interface claims says nothing about the cable behind it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

import psutil
import torch.distributed as dist

from pardemo.measure.evidence import host

BYTES_ACKED = 120  # offset of tcpi_bytes_acked in Linux's struct tcp_info
CHUNK, MOST_BYTES, LONG_ENOUGH_S, PATIENCE_S = 65536, 8_000_000, 0.3, 10.0


@dataclass(frozen=True)
class Road:
    """One network between this rank's machine and another's: bytes sent on it, bytes/s tried."""

    interface: str
    address: str
    sent_bytes: int
    bytes_per_s: float

    def __repr__(self) -> str:
        return (
            f"{self.interface} ({self.address}): {self.sent_bytes / 1e6:.3g} MB sent, "
            f"{self.bytes_per_s / 1e6:.3g} MB/s when tried"
        )


def roads() -> tuple[Road, ...]:
    """The networks between rank 0's machine and the next one (call it on every rank).

    Empty where all ranks are on one machine, or only one network joins the two.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return ()
    here = (f"{host()} {os.readlink('/proc/self/ns/net')}", addresses())
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, here)  # moves some names and addresses
    other = next((r for r, (net, _) in enumerate(everyone) if net != everyone[0][0]), None)
    if other is None:
        return ()
    pairs = _joined(everyone[0][1], everyone[other][1])
    if len(pairs) < 2:
        return ()
    sent, found = sent_bytes(), []
    for name, mine, theirs in pairs:
        found.append(Road(name, mine, sent.get(mine, 0), _try(mine, theirs, other)))
    return tuple(found)


def addresses() -> dict[str, tuple[str, str]]:
    """Interface -> (IPv4 address, netmask), of those that are up and lead off this machine."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    return {
        name: (a.address, a.netmask or "255.255.255.255")
        for name, found in psutil.net_if_addrs().items()
        for a in found
        if a.family == socket.AF_INET and name in up and not a.address.startswith("127.")
    }


def sent_bytes() -> dict[str, int]:
    """Local address -> bytes acknowledged so far on the open connections of this process."""
    totals: dict[str, int] = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as s:
                if s.family in (socket.AF_INET, socket.AF_INET6) and s.type == socket.SOCK_STREAM:
                    local = s.getsockname()[0].removeprefix("::ffff:")
                    info = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_ACKED + 8)
                    acked = struct.unpack_from("=Q", info, BYTES_ACKED)[0]
                    totals[local] = totals.get(local, 0) + acked
    return totals


def _joined(
    mine: dict[str, tuple[str, str]], theirs: dict[str, tuple[str, str]]
) -> list[tuple[str, str, str]]:
    """(interface here, address here, address there) of every network that both are in."""
    return [
        (name, address, there)
        for name, (address, mask) in mine.items()
        for there, _ in theirs.values()
        if there != address and ipaddress.ip_address(there) in
        ipaddress.ip_network(f"{address}/{mask}", strict=False)
    ]  # fmt: skip


def _try(mine: str, theirs: str, other: int) -> float:
    """Bytes per second from rank 0 to rank `other` between these addresses; 0 where none passed."""
    port: list[Any] = [None]
    with contextlib.ExitStack() as stack:
        if dist.get_rank() == 0:
            with contextlib.suppress(OSError):
                server = stack.enter_context(socket.create_server((mine, 0)))
                server.settimeout(PATIENCE_S)
                port = [server.getsockname()[1]]
        dist.broadcast_object_list(port, src=0)  # moves one number
        if port[0] is None:
            return 0.0
        with contextlib.suppress(OSError):
            if dist.get_rank() == 0:
                return _send(server)
            if dist.get_rank() == other:
                _receive((mine, port[0]), theirs)
    return 0.0


def _send(server: socket.socket) -> float:
    """Send for a while; the clock stops when the other side says that everything came."""
    with server.accept()[0] as s:
        s.settimeout(PATIENCE_S)
        sent, start = 0, time.perf_counter()
        while sent < MOST_BYTES and time.perf_counter() - start < LONG_ENOUGH_S:
            s.sendall(bytes(CHUNK))
            sent += CHUNK
        s.shutdown(socket.SHUT_WR)
        s.recv(1)
        return sent / (time.perf_counter() - start)


def _receive(address: tuple[str, int], source: str) -> None:
    with socket.create_connection(address, PATIENCE_S, (source, 0)) as s:
        while s.recv(CHUNK):
            pass
        s.sendall(b"!")
