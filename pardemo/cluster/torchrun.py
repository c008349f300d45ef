"""torchrun, as this project calls it: the command, its environment, and what a worker does first.

Two facts of torch 2.13 stand behind the settings. Its agent keeps one store for all attempts, so
that restarted gloo workers find the addresses of the dead ones and fail or hang; with
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 each attempt has a store of its own. And a worker outlives a
killed agent for ever, unless it asks the kernel to die with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch.distributed as dist
from torch.distributed import distributed_c10d

from pardemo.parameters import Refused

if TYPE_CHECKING:
    from pardemo.cluster.nodes import Nodes

ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
_PR_SET_PDEATHSIG = 1


def command(
    program: Sequence[str], nprocs: int, log_dir: str | Path, *, max_restarts: int = 0,
    nnodes: int = 1, node_rank: int = 0, master_addr: str = "127.0.0.1", master_port: int = 29500,
    shutdown_timeout_s: int = 5, join_timeout_s: int = 120,
) -> list[str]:  # fmt: skip
    """The argv of `torchrun ... program`: static rendezvous, logs inside `log_dir`.

    On one node the agent picks a free port itself and `master_port` is not used. On several, an
    agent gives up after `join_timeout_s` without the others (torchrun's own limit is 15 minutes).
    """
    if nprocs < 1 or nnodes < 1 or not 0 <= node_rank < nnodes or max_restarts < 0:
        raise Refused(
            f"nprocs and nnodes start at 1 and node_rank at 0, below nnodes; not nprocs={nprocs}, "
            f"nnodes={nnodes}, node_rank={node_rank}, max_restarts={max_restarts}"
        )
    meet = ["--standalone", "--local-addr=127.0.0.1"]  # else its host name, which need not resolve
    if nnodes > 1:
        meet = [f"--node-rank={node_rank}", f"--master-addr={master_addr}"]
        meet += [f"--master-port={master_port}", f"--rdzv-conf=timeout={join_timeout_s}"]
    return [
        sys.executable, "-m", "torch.distributed.run", f"--nnodes={nnodes}",
        f"--nproc-per-node={nprocs}", *meet, f"--max-restarts={max_restarts}",
        f"--shutdown-timeout={shutdown_timeout_s}", "--monitor-interval=0.5",
        f"--log-dir={log_dir}", *program,
    ]  # fmt: skip


def run_on_nodes(
    nodes: Nodes, program: Sequence[str], log_dir: str | Path, nprocs_per_node: int = 1,
    timeout: float = 120.0,
) -> list[subprocess.CompletedProcess[str]]:  # fmt: skip
    """`torchrun ... program` on every node of a lab, to the end; all are ended at the deadline.

    The outer deadline is needed: with a cable pulled, an agent of torchrun may wait on for minutes.
    """
    port = nodes.next_port()

    def start(node: int, pipes: dict[str, Any]) -> subprocess.Popen[str]:
        argv = command(
            program, nprocs_per_node, Path(log_dir) / nodes.names[node], nnodes=len(nodes),
            node_rank=node, master_addr=nodes.addresses[0], master_port=port,
        )  # fmt: skip
        return nodes.popen(node, argv, ENVIRONMENT, **pipes)

    return _to_the_end(len(nodes), start, timeout)


def run_side_by_side(
    program: Sequence[str], log_dir: str | Path, nnodes: int = 2, timeout: float = 120.0
) -> list[subprocess.CompletedProcess[str]]:
    """The same without a lab: `nnodes` agents of one rank each on this machine, over loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, **ENVIRONMENT, "GLOO_SOCKET_IFNAME": "lo"}

    def start(node: int, pipes: dict[str, Any]) -> subprocess.Popen[str]:
        logs = Path(log_dir) / f"node{node}"
        argv = command(program, 1, logs, nnodes=nnodes, node_rank=node, master_port=port)
        return subprocess.Popen(argv, env=environment, **pipes)

    return _to_the_end(nnodes, start, timeout)


def _to_the_end(
    count: int, start: Callable[[int, dict[str, Any]], subprocess.Popen[str]], timeout: float
) -> list[subprocess.CompletedProcess[str]]:
    """Start agents, read what they print, and end those that still run at the deadline."""
    pipes = {"text": True, "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE,
             "stderr": subprocess.STDOUT}  # fmt: skip
    deadline = time.monotonic() + timeout
    agents: list[subprocess.Popen[str]] = []
    try:
        for node in range(count):
            agents.append(start(node, pipes))
        outputs = [agent.communicate(timeout=deadline - time.monotonic())[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    return [
        subprocess.CompletedProcess(agent.args, agent.returncode, output)
        for agent, output in zip(agents, outputs, strict=True)
    ]


REMEDIES = (
    (r"EADDRINUSE|address already in use",
     "the port is taken on node 0: choose another --master-port"),
    (r"client socket has timed out.*?trying to connect to (\([^)]*\))",
     "nobody answers at {0}: start the agent of node 0, or correct --master-addr; "
     "`pardemo doctor --nodes ...` on each node says which"),
    (r"waiting for clients\. (\d+/\d+) clients joined",
     "{0} agents came: start the others, and look at what they print"),
    (r"Signal 9 \(SIGKILL\) received by PID (\d+)",
     "process {0} was killed from outside, as the kernel does when memory runs out"),
)  # fmt: skip


def why(output: str) -> str:
    """What to do about a failure that torchrun printed; "" where nothing known is in it."""
    for pattern, remedy in REMEDIES:
        if found := re.search(pattern, output, re.DOTALL):
            return remedy.format(*found.groups())
    return ""


def die_with_parent() -> None:
    """Ask the kernel to kill this worker when its agent ends, also by SIGKILL (Linux)."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def limit_collectives(timeout_s: float) -> None:
    """Give every group of this rank the limit: torch gives 30 minutes to all but the first."""
    if dist.is_initialized():
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def kill_stopped_siblings() -> None:
    """End the workers of this agent that are stopped: a rank calls it when it gives up.

    torchrun (2.13) asks them with SIGTERM, which a stopped process does not hear, and kills them
    only after 30 s, whatever --shutdown-timeout says.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    for sibling in psutil.Process().parent().children():
        with contextlib.suppress(psutil.Error):
            if sibling.status() == psutil.STATUS_STOPPED:
                sibling.kill()


def write_record(folder: Path, name: str, values: dict[str, Any]) -> Path:
    """One JSON file, there whole or not at all; for records of jobs on other machines."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path, temporary = folder / f"{name}.json", folder / f".{name}.{os.getpid()}.tmp"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return path
