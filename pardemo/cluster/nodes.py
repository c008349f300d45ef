"""The node lab: real Linux nodes on one machine, joined by a link as slow as you like.

    with Nodes(2, rate="100mbit") as nodes:
        results = nodes.launch(train, nprocs_per_node=1)     # ranks on both nodes, over the link
        nodes.tx_bytes()                                     # what the link's counters saw

A node is a set of namespaces: its own network interface, host name, hosts file, /dev/shm and
process ids; files and cores are shared with this machine. A bridge joins the nodes; there is no way
out of it, so nothing inside reaches, or is reached from, any other network. Works as root, or as a
user where the kernel allows user namespaces. The lab ends with its process, however that ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pardemo.cluster import holding
from pardemo.cluster.holding import Held, NodesError
from pardemo.cluster.link import Link, link
from pardemo.parameters import Refused

if TYPE_CHECKING:
    from pardemo.cluster.node_launch import NodeRanks
    from pardemo.launch import Results

PREFIX = 24


class Nodes:
    """`count` nodes joined by a link of `rate` ("1gbit", "unlimited") and `latency_ms` one way.

    `addresses[i]` is node i's address on interface eth0, `names[i]` its host name; every node's
    hosts file knows all of them. `shm_bytes` is the size of each node's /dev/shm. Raises
    NodesError where the machine cannot do it, Refused for a bad value.
    """

    def __init__(
        self, count: int = 2, rate: str | float | None = None, latency_ms: float | None = None,
        shm_bytes: int = 1 << 30, stay: bool = False,
    ) -> None:  # fmt: skip
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 32:
            raise Refused(f"a lab has 1 to 32 nodes, not {count!r}")
        if missing := tools_missing():
            raise NodesError("; ".join(missing))
        shape = link(rate, latency_ms)
        self._adopt(holding.start(_spec(count, shape, int(shm_bytes), stay)))

    def _adopt(self, held: Held) -> None:
        self.held = held
        self.names = [node["name"] for node in held.spec["nodes"]]
        self.addresses = [node["address"] for node in held.spec["nodes"]]
        self.shape = Link(*held.spec["link"])
        self.notes = held.notes
        self._port = 29500

    @classmethod
    def standing(cls) -> Nodes:
        """The lab that `pardemo nodes up` left standing; NodesError where there is none."""
        held = holding.load()
        if held is None:
            raise NodesError("no node lab stands: make one with `pardemo nodes up`")
        nodes = cls.__new__(cls)
        nodes._adopt(held)
        return nodes

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        state = "" if self.alive else " (ended)"
        return f"{len(self)} nodes at {', '.join(self.addresses)}, link {self.shape}{state}"

    @property
    def alive(self) -> bool:
        """Whether the lab still stands."""
        return self.held.alive

    def close(self) -> None:
        """End everything that runs in the nodes, and the nodes."""
        self.held.end()

    def command(self, node: int, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` inside `node`, from anywhere on this machine."""
        if not self.alive:
            raise NodesError("the node lab has ended: make a new one")
        if not 0 <= node < len(self):
            raise Refused(f"there is no node {node}: they are 0 to {len(self) - 1}")
        return holding.entering(self.held.holder_pids[node], os.getcwd(), argv)

    def popen(
        self, node: int, argv: Sequence[str], env: Mapping[str, str] | None = None, **how: Any
    ) -> subprocess.Popen[Any]:
        """Start a command inside `node`; `env` is added to this process's environment."""
        environment = {**os.environ, **self.environment(), **(env or {})}
        return subprocess.Popen(self.command(node, argv), env=environment, **how)

    def run(
        self, node: int, argv: Sequence[str], timeout: float = 60.0,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Run a command inside `node` to its end; killed with TimeoutExpired after `timeout` s."""
        environment = {**os.environ, **self.environment(), **(env or {})}
        return subprocess.run(
            self.command(node, argv), env=environment, timeout=timeout,
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip

    def environment(self) -> dict[str, str]:
        """What every process in the lab is told: which interface leads to the other nodes."""
        return {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}

    def tx_bytes(self) -> list[int]:
        """Bytes each node has sent over its cable so far, headers included: the link's counter."""
        return [_counter(pid, 8) for pid in self.held.holder_pids]

    def rx_bytes(self) -> list[int]:
        """Bytes each node has received over its cable so far, headers included."""
        return [_counter(pid, 0) for pid in self.held.holder_pids]

    def set_link(self, rate: str | float | None = None, latency_ms: float | None = None) -> None:
        """Give every cable another rate and latency, also while ranks are running."""
        self.shape, wanted = link(rate), link(rate, latency_ms)
        for node, holder in enumerate(self.held.holder_pids):
            _net(holder, wanted.lines("eth0", latency=True))
            _net(self.held.hub_pid, wanted.lines(f"port{node}", latency=False))
        self.shape = wanted

    def plug(self, node: int, plugged: bool) -> None:
        """Pull a node's cable out of the switch, or put it back."""
        _net(self.held.hub_pid, [f"ip link set dev port{node} {'up' if plugged else 'down'}"])

    def launch(
        self, fn: Callable[..., Any], *args: Any, nprocs_per_node: int = 1, **how: Any
    ) -> Results:
        """Run `fn` on `nprocs_per_node` ranks of every node; the rest is as in pardemo.launch."""
        from pardemo.cluster.node_launch import launch

        return launch(self, fn, *args, nprocs_per_node=nprocs_per_node, **how)

    def ranks(self, nprocs_per_node: int = 1, **how: Any) -> NodeRanks:
        """Warm ranks on every node, for several calls: `with nodes.ranks() as ranks`."""
        from pardemo.cluster.node_launch import NodeRanks

        return NodeRanks(self, nprocs_per_node, **how)

    def next_port(self) -> int:
        """A port that no earlier launch through this object has used."""
        self._port += 1
        return self._port


def tools_missing() -> list[str]:
    """What this machine lacks for a lab, before trying: one sentence each, with the remedy."""
    if sys.platform != "linux":
        return ["nodes are Linux namespaces: use a Linux machine or virtual machine"]
    return [
        f"the command {tool!r} is missing: install iproute2 (apt-get install iproute2)"
        for tool in ("ip", "tc")
        if not shutil.which(tool)
    ]


def reasons_against() -> list[str]:
    """Why this machine cannot have a node lab, with remedies; empty when it can (tries one)."""
    try:
        Nodes(1).close()
    except NodesError as error:
        return [str(error)]
    return []


def _spec(count: int, shape: Link, shm_bytes: int, stay: bool) -> dict[str, Any]:
    """The hub's orders (see hub.py)."""
    nodes = [{"name": f"node{i}", "address": f"10.77.0.{i + 1}"} for i in range(count)]
    hosts = ["127.0.0.1 localhost"]
    for node in nodes:  # torch asks for the name of the mapped address too
        hosts += [f"{prefix}{node['address']} {node['name']}" for prefix in ("", "::ffff:")]
    return {
        "nodes": nodes,
        "prefix": PREFIX,
        "hosts": "\n".join(hosts) + "\n",
        "link": (shape.rate_bits, shape.latency_ms),
        "node_batch": shape.lines("eth0", latency=True, fresh=True),
        "port_batch": shape.lines("{port}", latency=False, fresh=True),
        "shm_bytes": shm_bytes,
        "user": os.geteuid() != 0,
        "stay": stay,
    }


def _counter(pid: int, column: int) -> int:
    try:
        text = Path(f"/proc/{pid}/net/dev").read_text()
    except OSError:
        raise NodesError("the node lab has ended: its counters are gone") from None
    for line in text.splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "eth0":
            return int(numbers.split()[column])
    raise NodesError("the node has no interface eth0")


def _net(pid: int, lines: list[str]) -> None:
    """Run `ip` and `tc` lines in the namespaces of a process."""
    for line in lines:
        argv = holding.entering(pid, "/", line.split())
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20)
        if done.returncode:
            raise NodesError(holding.explain(done.stderr))
