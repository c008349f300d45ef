"""The doctor's connections: from every node to every other, and what came of the other direction.

A firewall may let one direction pass and drop the other, or let in the ports it was told of and
drop those which gloo and nccl choose. gloo connects each pair of ranks in one direction only, so
that such a firewall shows up on one day and not on another.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Generator
from dataclasses import dataclass

from pardemo.cluster.desk import Answer, Desk, Silent, ask
from pardemo.cluster.doctor import FAIL, OK, WARN, Finding, compare, facts

TRIES = 3  # connections to a port that listens, before it is called closed


@dataclass(frozen=True)
class Node:
    """One of the nodes as the user wrote it, and the address its name has here (None: none)."""

    host: str
    port: int
    address: str | None

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def both_ways(
    nodes: list[Node], desk: Desk, timeout: float, pairs: bool
) -> Generator[Finding, None, set[int]]:
    """Connect to every other node, hear how the others fared; gives the nodes for all-reduces."""
    others = {index: node for index, node in enumerate(nodes) if index != desk.index}
    met, good = {}, set()
    for index, node in others.items():
        met[index] = yield from meet(node, index, nodes, desk, timeout)
    desk.publish({index: verdict for index, (_, verdict) in met.items()}, pairs)
    for index, (answers, verdict) in met.items():
        if not answers:
            continue
        node = nodes[index]
        answer = yield from hear(node, nodes[desk.index], desk, timeout * len(nodes) + 10)
        if answer is not None and not verdict and not answer.verdict:
            yield Finding(OK, f"{node} and this node connect to each other, on any port")
            good |= {index} if answer.pairs else set()
            if pairs and not answer.pairs:
                text = f"{node} does no all-reduce: it was told so, or is not well itself"
                yield Finding(WARN, text, "look at what the doctor says there")
    return good


def meet(
    node: Node, index: int, nodes: list[Node], desk: Desk, timeout: float
) -> Generator[Finding, None, tuple[bool, str]]:
    """Connect to another node until it answers, then to a port that it chose; yields findings.

    Gives whether it answers, and what is wrong with the way there, said to the other node; "" where
    nothing is.
    """
    mine = nodes[desk.index]
    try:
        answer = _patiently(node, node.port, desk.index, timeout)
    except ValueError:
        yield Finding(FAIL, f"{node} answers, but it is no doctor", "choose another port")
        return False, f"another program answered at {node}"
    except Silent:
        yield Finding(
            FAIL, f"{node} ({node.address}) takes connections and says nothing: it is no "
            "doctor, or one that is stopped", "choose another port, or look at it there",
        )  # fmt: skip
        return False, f"{node} took the connection and said nothing"
    except OSError as error:
        yield _unreachable(mine, node, error, timeout, index in desk.asked)
        return False, f"port {node.port} {_kind(error)}"
    if (wrong := _another(node, index, nodes, answer)) is not None:
        yield wrong
        return False, "it met another node at that address"
    yield from compare(facts(), answer.facts, answer.clock_s)
    try:
        _patiently(node, answer.port, desk.index, 0.0, TRIES)
    except (OSError, ValueError, Silent) as error:
        yield Finding(
            FAIL, f"{node} answers, but a connection from here to another of its ports, "
            f"{answer.port}, {_kind(error)}: gloo and nccl use any port", _open(mine, node),
        )  # fmt: skip
        return True, f"port {node.port} answers, another one, {answer.port}, {_kind(error)}"
    return True, ""


def hear(
    node: Node, mine: Node, desk: Desk, limit_s: float
) -> Generator[Finding, None, Answer | None]:
    """Ask another node until it has tried all others; a finding where it cannot connect here."""
    deadline, refused = time.monotonic() + limit_s, 0
    while time.monotonic() < deadline and refused < 10:
        try:
            answer = ask(str(node.address), node.port, desk.index)
        except (OSError, ValueError, Silent) as error:
            refused += isinstance(error, ConnectionRefusedError)
        else:
            if answer.verdict:
                yield Finding(
                    FAIL, f"{node} cannot connect to this node: {answer.verdict}", _open(node, mine)
                )
            if answer.verdict is not None:
                return answer
        time.sleep(0.2)
    yield Finding(
        FAIL, f"{node} has ended, or is silent, before it said whether it can connect to this node",
        "look at what the doctor says there, and start both again",
    )  # fmt: skip
    return None


def _patiently(node: Node, port: int, mine: int, timeout: float, tries: int = 1) -> Answer:
    """Ask until somebody answers, `timeout` seconds and `tries` times at least."""
    deadline = time.monotonic() + timeout
    while True:
        tries -= 1
        try:
            return ask(str(node.address), port, mine)
        except OSError:
            if tries <= 0 and time.monotonic() > deadline:
                raise
        time.sleep(0.3)


def _another(node: Node, index: int, nodes: list[Node], answer: Answer) -> Finding | None:
    """A finding where another node answers than was asked, or one with another list of nodes."""
    if answer.index == index and list(answer.nodes) == [str(one) for one in nodes]:
        return None
    if list(answer.nodes) == [str(one) for one in nodes] and 0 <= answer.index < len(nodes):
        return Finding(
            FAIL, f"{node} is {node.address} here, and there {nodes[answer.index]} answers",
            "correct /etc/hosts or DNS on this node, or --this on that one",
        )  # fmt: skip
    return Finding(
        FAIL, f"{node} was given other nodes: {' '.join(answer.nodes)[:200]}",
        "give every node the same list in the same order",
    )  # fmt: skip


def _kind(error: Exception) -> str:
    """What happened to a connection, in words that follow the name of a port."""
    if isinstance(error, ConnectionRefusedError):
        return "refuses"
    if isinstance(error, TimeoutError):
        return "is silent, packets are dropped"
    if isinstance(error, OSError):
        return f"cannot be reached ({error.strerror or error})"
    return "is answered by another program"


def _open(dials: Node, listens: Node) -> str:
    """The remedy for a direction that is closed."""
    return (
        f"on {listens.host} let {dials.host} in on every TCP port: iptables -I INPUT -s "
        f"{dials.address} -j ACCEPT (or nft, or the cloud's security group); if it is open there, "
        f"a firewall on {dials.host} or between them lets nothing out"
    )


def _unreachable(mine: Node, node: Node, error: OSError, timeout: float, it_comes: bool) -> Finding:
    """What the kind of silence means; `it_comes`: the other node has connected to this one."""
    if it_comes:
        return Finding(
            FAIL, f"a connection from here to {node} ({node.address}) {_kind(error)}, while "
            f"{node.host} connects to this node: one direction is closed", _open(mine, node),
        )  # fmt: skip
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
