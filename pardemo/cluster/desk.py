"""What doctors say to each other: who they are, and whom they could reach.

A doctor listens on the port it was given and on one that the kernel chooses, as gloo and nccl do.
It answers each connection with one JSON object, and tells the node that asks what came of its own
connecting to that node: so both ends of a way know of both directions.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pardemo.cluster.doctor import facts

LIMIT = 65536  # bytes of an answer
DIAL_S = 3.0
NAMES = ("host", "python", "torch", "nccl")


class Silent(Exception):
    """Somebody listens, and does not answer."""


@dataclass(frozen=True)
class Answer:
    """What another doctor says. `clock_s`: how far its clock is ahead of this one.

    `verdict` is None until it has tried all nodes; then what was wrong with its way to this one, or
    "". `pairs`: whether it goes on to all-reduces.
    """

    facts: dict[str, Any]
    clock_s: float
    index: int
    nodes: tuple[str, ...]
    port: int
    verdict: str | None
    pairs: bool


def ask(address: str, port: int, index: int) -> Answer:
    """Connect to a doctor as node `index`. OSError where nobody can be reached, Silent where
    somebody says nothing, ValueError where it is no doctor."""
    began = time.time()
    with socket.create_connection((address, port), DIAL_S) as connection:
        connection.sendall(f"doctor {index}\n".encode())
        data = b""
        try:
            while len(data) < LIMIT and (part := connection.recv(4096)):
                data += part
        except TimeoutError:
            raise Silent from None
    middle = (began + time.time()) / 2
    try:
        return _understood(json.loads(data), middle)
    except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"no doctor answers: {error}") from None


def _understood(said: dict[str, Any], middle: float) -> Answer:
    """The answer, each value of which must be what a doctor sends: it is printed, and relied on."""
    words = [*(said["facts"][name] for name in NAMES), *said["nodes"], said["verdict"] or ""]
    if not all(isinstance(word, str) and len(word) < 500 and word.isprintable() for word in words):
        raise ValueError("its words cannot be printed")
    port, index, gpus = int(said["port"]), int(said["index"]), int(said["facts"]["gpus"])
    known = {**{name: said["facts"][name] for name in NAMES}, "gpus": gpus}
    return Answer(
        known, float(said["clock"]) - middle, index, tuple(said["nodes"]), port, said["verdict"],
        bool(said["pairs"]),
    )  # fmt: skip


class Desk:
    """This node's doctor, as the others hear it. `asked`: the nodes that have connected so far,
    `told`: those that have learned what came of this node's connecting to them."""

    def __init__(self, address: str, port: int, index: int, nodes: Sequence[str]) -> None:
        self.index, self.nodes, self.known = index, list(nodes), facts()
        self.asked: set[int] = set()
        self.told: set[int] = set()
        self._verdicts: dict[int, str] | None = None
        self._pairs = False
        self._sockets = [socket.create_server((address, port), backlog=128)]
        self._sockets.append(socket.create_server((address, 0), backlog=128))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @contextlib.contextmanager
    def open(self) -> Iterator[Desk]:
        """Answers inside."""
        self._thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            self._thread.join()
            for server in self._sockets:
                server.close()

    def publish(self, verdicts: dict[int, str], pairs: bool) -> None:
        """From now on say what came of connecting to each other node: "" where all is well."""
        self._verdicts, self._pairs = verdicts, pairs

    def _serve(self) -> None:
        while not self._ended.is_set():
            for server in select.select(self._sockets, [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    connection, _ = server.accept()
                    with connection:
                        connection.settimeout(2)
                        self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        words = connection.recv(64).split()
        who = int(words[1]) if len(words) == 2 and words[1].isdigit() else -1
        verdict = self._verdicts.get(who) if self._verdicts is not None else None
        said = {
            "facts": self.known, "clock": time.time(), "index": self.index, "nodes": self.nodes,
            "port": self._sockets[1].getsockname()[1], "verdict": verdict, "pairs": self._pairs,
        }  # fmt: skip
        connection.sendall(json.dumps(said).encode())
        self.asked.add(who)
        if verdict is not None:
            self.told.add(who)
