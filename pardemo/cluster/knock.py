"""Knock at the address where ranks meet, before torch does: it waits minutes without a word."""

from __future__ import annotations

import os
import socket
import sys
import time

SAY_AFTER_S = 10.0


def at_master(limit_s: float) -> None:
    """On every rank but 0, wait until rank 0 answers at MASTER_ADDR and MASTER_PORT."""
    if os.environ.get("RANK", "0") != "0":
        at(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), limit_s)


def at(host: str, port: int, limit_s: float, say_after_s: float = SAY_AFTER_S) -> None:
    """Wait until somebody listens there: says so once when it takes long, gives up at the limit.

    Raises RuntimeError, in one line: who is silent, for how long, and what to do.
    """
    began, said = time.monotonic(), False
    while (error := _knock(host, port)) is not None:
        waited_s = time.monotonic() - began
        trouble = _trouble(host, port, waited_s, error)
        if waited_s >= limit_s:
            raise RuntimeError(trouble)
        if not said and waited_s >= say_after_s:
            print(f"note: {trouble}; waiting for {limit_s:.0f} s", file=sys.stderr, flush=True)
            said = True
        time.sleep(min(0.2, limit_s))


def _trouble(host: str, port: int, waited_s: float, error: OSError) -> str:
    reason = f"after {waited_s:.0f} s ({error.strerror or error})"
    if isinstance(error, socket.gaierror):
        return (
            f"rank 0's name {host} has no address here {reason}: add it to /etc/hosts or DNS; "
            "torchrun on one machine does without it: --local-addr=127.0.0.1"
        )
    return (
        f"nobody answers at {host}:{port} {reason}: start rank 0 there, or correct MASTER_ADDR and "
        "MASTER_PORT (--master-addr, --master-port); `pardemo doctor --nodes ...` on each node "
        "says which"
    )


def _knock(host: str, port: int) -> OSError | None:
    try:
        socket.create_connection((host, port), 2).close()
    except OSError as error:
        return error
    return None
