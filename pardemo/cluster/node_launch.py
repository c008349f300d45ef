"""Functions on ranks of several nodes: the launcher's ranks, started inside a node lab.

Everything `pardemo.launch` promises holds here too (whose fault it was, timeouts, labelled output,
values back); only the place differs. Rank r lives on node r // nprocs_per_node, and ranks of
different nodes talk over the lab's link: gloo and nccl are told its interface, the store listens on
node 0's address.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pardemo.launch import family, leftovers
from pardemo.launch.api import Ranks
from pardemo.launch.results import Results
from pardemo.launch.servers import Started, open_ends
from pardemo.parameters import Refused

if TYPE_CHECKING:
    from pardemo.cluster.nodes import Nodes

RANK = (
    "import sys; from pardemo.launch.rank import main; "
    "main(*map(int, sys.argv[2:]), folder=sys.argv[1])"
)
PACKAGE = str(Path(__file__).parents[2])


class NodeRanks(Ranks):
    """Warm ranks on the nodes of a lab, `nprocs_per_node` on each; `how` is as in pardemo.Ranks."""

    def __init__(self, nodes: Nodes, nprocs_per_node: int = 1, **how: Any) -> None:
        if not isinstance(nprocs_per_node, int) or nprocs_per_node < 1:
            raise Refused(f"nprocs_per_node must be at least 1, not {nprocs_per_node!r}")
        super().__init__(nprocs_per_node * len(nodes), **how)
        self.setup = replace(
            self.setup,
            start=functools.partial(start, nodes),
            rank_env=environments(nodes, nprocs_per_node),
        )


def launch(
    nodes: Nodes, fn: Callable[..., Any], *args: Any, nprocs_per_node: int = 1,
    threads: int = 1, timeout: float | None = 60.0, backend: str | None = None,
    seed: int | None = 0, echo: bool = True, env: dict[str, str] | None = None,
    debug: bool = False, **kwargs: Any,
) -> Results:  # fmt: skip
    """Run `fn(*args, **kwargs)` on ranks of every node, as `pardemo.launch` does on one machine.

    Raises RankFailed, which names the rank at fault, and RankTimeout.
    """
    ranks = NodeRanks(
        nodes, nprocs_per_node, threads=threads, timeout=timeout, backend=backend,
        seed=seed, echo=echo, env=env, debug=debug,
    )  # fmt: skip
    try:
        return ranks.run(fn, args, kwargs, last=True)
    finally:
        ranks.close()


def environments(nodes: Nodes, nprocs_per_node: int) -> list[dict[str, str]]:
    """What torchrun would have told each rank of these nodes: where it is, where to meet."""
    port, world_size = nodes.next_port(), nprocs_per_node * len(nodes)
    return [
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank % nprocs_per_node),
            "LOCAL_WORLD_SIZE": str(nprocs_per_node),
            "GROUP_RANK": str(rank // nprocs_per_node),
            "MASTER_ADDR": nodes.addresses[0],
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "False",
            **nodes.environment(),
        }
        for rank in range(world_size)
    ]


def start(nodes: Nodes, nprocs: int) -> Started:
    """Start one rank process per rank, each inside its node."""
    ends, theirs = open_ends(nprocs)
    path = os.pathsep.join(filter(None, [PACKAGE, os.environ.get("PYTHONPATH")]))
    per_node, folders = nprocs // len(nodes), leftovers.name_folders(nprocs)
    processes: list[subprocess.Popen[Any]] = []
    try:
        for rank, fds in enumerate(theirs):
            argv = [sys.executable, "-c", RANK, folders[rank], str(rank), *map(str, fds)]
            how: dict[str, Any] = {"stdin": subprocess.DEVNULL, "start_new_session": True}
            where = rank // per_node
            processes.append(nodes.popen(where, argv, {"PYTHONPATH": path}, pass_fds=fds, **how))
    except BaseException:
        for process in processes:
            family.kill(process.pid)
        leftovers.clear(*folders)
        raise
    finally:
        for fd in (fd for row in theirs for fd in row):
            os.close(fd)
    watched = {os.pidfd_open(process.pid): process for process in processes}
    quiet, unused = os.pipe()

    def died(rank: int, pidfd: int) -> list[tuple[int, str, Any]]:
        os.dup2(quiet, pidfd)  # a pidfd stays readable for ever: put a silent descriptor there
        return [(rank, "exited", processes[rank].wait())]

    def stop() -> None:
        for process in processes:
            family.kill(process.pid)

    def release() -> None:
        for process in processes:
            process.wait()
        leftovers.clear(*folders)
        for fd in (*watched, quiet, unused):
            os.close(fd)

    calls: dict[int, Callable[[], list[tuple[int, str, Any]]]]
    calls = {fd: functools.partial(died, rank, fd) for rank, fd in enumerate(watched)}
    return Started(ends, calls, stop, release, {r: p.pid for r, p in enumerate(processes)})
