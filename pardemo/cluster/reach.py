"""The doctor's part between nodes: meet on the given ports, compare, all-reduce in every pair."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterator

import psutil

from pardemo.cluster import meeting
from pardemo.cluster.desk import Desk
from pardemo.cluster.doctor import FAIL, OK, VARIABLES, WARN, Finding, here, interfaces, meant
from pardemo.cluster.meeting import Node
from pardemo.parameters import Refused


def parse(text: str) -> Node:
    """`host:port`; Refused unless it is one with a port above 1023."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 1024 <= int(port) <= 65534:
        raise Refused(f"a node is host:port with a port of 1024 to 65534, not {text[:80]!r}")
    try:
        address = socket.gethostbyname(host)
    except (OSError, UnicodeError):  # a name may be too long to ask for
        address = None
    return Node(host, int(port), address)


def examine(nodes: list[Node], this: int | None, timeout: float, pairs: bool) -> Iterator[Finding]:
    """All findings about this node and its way to the others, as they are made."""
    yield from here()
    wrong = list(_names(nodes))
    index = _this(nodes) if this is None else this
    if not wrong:
        wrong = list(_own(nodes, index))
    yield from wrong
    if wrong or index is None:
        return
    mine = nodes[index]
    elsewhere = list(_elsewhere(mine)) if len(nodes) > 1 else []
    yield from elsewhere
    pairs = pairs and FAIL not in [finding.level for finding in elsewhere]
    try:
        desk = Desk(str(mine.address), mine.port, index, [str(node) for node in nodes])
    except OSError as error:
        yield _cannot_listen(mine, error)
        return
    with desk.open():
        good = yield from meeting.both_ways(nodes, desk, timeout, pairs)
        if pairs:
            yield from all_reduce(nodes, index, timeout, good)
        deadline = time.monotonic() + timeout
        while len(desk.told) < len(nodes) - 1 and time.monotonic() < deadline:
            time.sleep(0.1)  # a slower node has still to ask


def _names(nodes: list[Node]) -> Iterator[Finding]:
    """Names that have no address here, and names that have the same one."""
    known: dict[tuple[str, int], Node] = {}
    for node in nodes:
        if node.address is None:
            yield Finding(FAIL, f"{node.host} does not resolve here", "add it to DNS or /etc/hosts")
        elif (other := known.setdefault((node.address, node.port), node)) is not node:
            yield Finding(
                FAIL, f"{other} and {node} are both {node.address} here",
                "name every node once, and correct /etc/hosts or DNS on this node",
            )  # fmt: skip


def _own(nodes: list[Node], index: int | None) -> Iterator[Finding]:
    """What is wrong with the address at which the others are to find this node."""
    local = sorted(a for addresses in interfaces().values() for a in addresses)
    if index is None:
        yield Finding(
            FAIL, f"none of {', '.join(map(str, nodes))} is an address of this machine "
            f"({', '.join(local)})", "correct the list, or say --this INDEX",
        )  # fmt: skip
    elif len(nodes) > 1 and str(nodes[index].address).startswith("127."):
        yield Finding(
            FAIL, f"{nodes[index].host} resolves to {nodes[index].address} here: other nodes "
            "cannot reach that",
            "correct /etc/hosts on this node, or give the address that the others use",
        )  # fmt: skip
    elif nodes[index].address not in local:
        yield Finding(
            FAIL, f"{nodes[index].host} resolves to {nodes[index].address} here, which is no "
            f"address of this machine ({', '.join(local)})",
            "correct /etc/hosts or DNS on this node, or --this",
        )  # fmt: skip


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


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Every pair of `count` nodes once, in rounds where no node is in two (circle method)."""
    circle = [*range(count), *([-1] if count % 2 else [])]
    half, made = len(circle) // 2, []
    for _ in range(len(circle) - 1):
        sides = zip(circle[:half], reversed(circle[half:]), strict=True)
        made.append([(min(p), max(p)) for p in sides if -1 not in p])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return made


def all_reduce(
    nodes: list[Node], index: int, timeout: float, good: Collection[int]
) -> Iterator[Finding]:
    """A real 2-rank all-reduce with each of the `good` nodes, in the order all nodes agree on."""
    for pair in (pair for made in rounds(len(nodes)) for pair in made if index in pair):
        if pair[1 - pair.index(index)] not in good:
            continue
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
