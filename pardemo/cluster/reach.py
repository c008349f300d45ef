"""The doctor's part between nodes: meet on the given ports, compare, all-reduce in every pair."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import psutil

from pardemo.cluster.doctor import (
    FAIL,
    OK,
    VARIABLES,
    WARN,
    Finding,
    compare,
    facts,
    here,
    interfaces,
    meant,
)
from pardemo.parameters import Refused

LIMIT = 65536  # bytes of an answer


@dataclass(frozen=True)
class Node:
    """One of the nodes as the user wrote it, and the address its name has here (None: none)."""

    host: str
    port: int
    address: str | None

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def parse(text: str) -> Node:
    """`host:port`; Refused unless it is one with a port above 1023."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 1024 <= int(port) <= 65534:
        raise Refused(f"a node is host:port with a port of 1024 to 65534, not {text[:80]!r}")
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = None
    return Node(host, int(port), address)


def examine(nodes: list[Node], this: int | None, timeout: float, pairs: bool) -> Iterator[Finding]:
    """All findings about this node and its way to the others, as they are made."""
    yield from here()
    unknown = [Finding(FAIL, f"{n.host} does not resolve here", "add it to DNS or /etc/hosts")
               for n in nodes if n.address is None]  # fmt: skip
    yield from unknown
    if unknown:
        return
    index = _this(nodes) if this is None else this
    if index is None:
        local = sorted(a for addresses in interfaces().values() for a in addresses)
        yield Finding(
            FAIL, f"none of {', '.join(map(str, nodes))} is an address of this machine "
            f"({', '.join(local)})", "correct the list, or say --this INDEX",
        )  # fmt: skip
        return
    mine = nodes[index]
    if len(nodes) > 1 and str(mine.address).startswith("127."):
        yield Finding(
            FAIL, f"{mine.host} resolves to {mine.address} here: other nodes cannot reach that",
            "correct /etc/hosts on this node, or give the address that the others use",
        )  # fmt: skip
        return
    elsewhere = list(_elsewhere(mine)) if len(nodes) > 1 else []
    yield from elsewhere
    pairs = pairs and FAIL not in [finding.level for finding in elsewhere]
    with contextlib.ExitStack() as stack:
        try:
            asked = stack.enter_context(serving(mine))
        except OSError as error:
            yield _cannot_listen(mine, error)
            return
        reached = True
        for node in (node for node in nodes if node is not mine):
            reached = (yield from meet(node, timeout)) and reached
        if pairs and reached:
            yield from all_reduce(nodes, index, timeout)
        deadline = time.monotonic() + timeout
        while len(asked) < len(nodes) - 1 and time.monotonic() < deadline:
            time.sleep(0.1)  # a slower node has still to ask


def _elsewhere(mine: Node) -> Iterator[Finding]:
    """Where gloo is told an interface that has not the address at which the nodes meet."""
    value, there = os.environ.get(VARIABLES[0], ""), interfaces()
    named = meant(VARIABLES[0], value, there)
    addresses = [address for name in named for address in there[name]]
    if not addresses or mine.address in addresses:
        return
    local = all(address.startswith("127.") for address in addresses)
    home = [name for name, own in there.items() if mine.address in own]
    yield Finding(
        FAIL if local else WARN,
        f"{VARIABLES[0]}={value} has the address {' '.join(addresses)}, and the nodes meet at "
        f"{mine.address}" + (": no other node can connect to it" if local else ""),
        f"set it to {' or '.join(home)}" + ("" if local else ", unless both lead to all nodes"),
    )


def _this(nodes: list[Node]) -> int | None:
    local = {address for addresses in interfaces().values() for address in addresses}
    return next((i for i, node in enumerate(nodes) if node.address in local), None)


@contextlib.contextmanager
def serving(mine: Node) -> Iterator[set[str]]:
    """Answer every connection to this node's port with its facts and its clock, as JSON.

    Gives the set of addresses that have asked so far.
    """
    asked: set[str] = set()
    with socket.create_server((str(mine.address), mine.port), backlog=128) as server:
        known, ended = facts(), threading.Event()
        server.settimeout(0.2)

        def serve() -> None:
            while not ended.is_set():
                with contextlib.suppress(OSError):
                    connection, peer = server.accept()
                    with connection:
                        connection.settimeout(5)
                        connection.sendall(json.dumps({**known, "clock": time.time()}).encode())
                    asked.add(peer[0])

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield asked
        finally:
            ended.set()
            thread.join()


def _cannot_listen(mine: Node, error: OSError) -> Finding:
    if error.errno != errno.EADDRINUSE:
        return Finding(FAIL, f"cannot listen on {mine}: {error.strerror}", "choose another port")
    holders = {
        f"process {c.pid}" + (f" ({psutil.Process(c.pid).name()})" if c.pid else "")
        for c in psutil.net_connections("tcp")
        if c.status == "LISTEN" and c.laddr and c.laddr.port == mine.port and c.pid
    }
    who = f" by {', '.join(sorted(holders))}" if holders else ""
    return Finding(FAIL, f"port {mine.port} is in use{who}", "end it, or choose another port")


class _Silent(Exception):
    """Somebody listens, and does not answer."""


def _answer(connection: socket.socket) -> bytes:
    """All that the other side sends, until it closes."""
    data = b""
    try:
        while len(data) < LIMIT and (part := connection.recv(4096)):
            data += part
    except TimeoutError:
        raise _Silent from None
    return data


def meet(node: Node, timeout: float) -> Generator[Finding, None, bool]:
    """Connect to another node until it answers; yields findings, returns whether it was reached."""
    deadline, last = time.monotonic() + timeout, OSError(errno.ETIMEDOUT, "timed out")
    while time.monotonic() < deadline:
        began = time.time()
        try:
            with socket.create_connection((str(node.address), node.port), 3) as connection:
                theirs = json.loads(_answer(connection))
            offset = theirs["clock"] - (began + time.time()) / 2
            yield from compare(facts(), theirs, offset)
            return True
        except (ValueError, KeyError, TypeError):
            yield Finding(FAIL, f"{node} answers, but it is no doctor", "choose another port")
            return False
        except _Silent:
            yield Finding(
                FAIL, f"{node} ({node.address}) takes connections and says nothing: it is no "
                "doctor, or one that is stopped", "choose another port, or look at it there",
            )  # fmt: skip
            return False
        except OSError as error:
            last = error
            time.sleep(0.3)
    yield _unreachable(node, last, timeout)
    return False


def _unreachable(node: Node, error: OSError, timeout: float) -> Finding:
    """What the kind of silence means."""
    if isinstance(error, ConnectionRefusedError):
        return Finding(
            FAIL, f"{node} ({node.address}) refuses: nobody listens there for {timeout:.0f} s",
            "run the same command there at the same time; if it runs, its name or port is another, "
            "or a firewall rejects the port",
        )  # fmt: skip
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
        return Finding(
            FAIL, f"there is no way to {node} ({node.address}): {error.strerror}",
            "the address is of another network, the cable or the node is down, or a firewall "
            "rejects: compare `ip route get ADDRESS` on both",
        )  # fmt: skip
    return Finding(
        FAIL, f"{node} ({node.address}) does not answer: packets are dropped",
        "a firewall drops them (open the ports between the nodes, torch uses any), the name leads "
        "to the wrong interface, or the node is down",
    )  # fmt: skip


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Every pair of `count` nodes once, in rounds where no node is in two (circle method)."""
    circle = [*range(count), *([-1] if count % 2 else [])]
    half, made = len(circle) // 2, []
    for _ in range(len(circle) - 1):
        sides = zip(circle[:half], reversed(circle[half:]), strict=True)
        made.append([(min(p), max(p)) for p in sides if -1 not in p])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return made


def all_reduce(nodes: list[Node], index: int, timeout: float) -> Iterator[Finding]:
    """A real 2-rank all-reduce with every other node, in the order all nodes agree on."""
    for pair in (pair for made in rounds(len(nodes)) for pair in made if index in pair):
        host, other = nodes[pair[0]], nodes[pair[1 - pair.index(index)]]
        argv = [sys.executable, "-m", "pardemo.cluster.pair", str(pair.index(index))]
        argv += [str(host.address), str(host.port + 1), str(timeout)]
        try:
            done = subprocess.run(
                argv, capture_output=True, text=True, timeout=2 * timeout + 60,
                stdin=subprocess.DEVNULL, env=os.environ,
            )  # fmt: skip
            said = (done.stdout if done.returncode == 0 else done.stderr).strip()
            worked = done.returncode == 0
        except subprocess.TimeoutExpired:
            said, worked = "it did not end in time", False
        if worked:
            yield Finding(OK, f"all-reduce with {other}: {said}")
        else:
            text = f"all-reduce with {other} failed: {_last(said)}"
            yield Finding(FAIL, text, _advice(said, host))


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if "Error" in line] or text.splitlines() or ["?"]
    return lines[-1][:300]


def _advice(said: str, host: Node) -> str:
    if "EADDRINUSE" in said:
        return f"port {host.port + 1} is in use on {host.host}: choose another than {host.port}"
    there = [name for name, addresses in interfaces().items() if name != "lo" and addresses]
    return (
        f"set GLOO_SOCKET_IFNAME (one of {', '.join(there)}) on every node to the interface "
        "between them; gloo connects on any port, so a firewall must let the nodes speak freely"
    )
