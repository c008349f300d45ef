"""One world of ranks that torchrun or Slurm started, and rank 0 that drives it.

    torchrun --nnodes 2 ... -m pardemo bench strategies      # the same command on every node

Rank 0 runs the program: a benchmark's cells, its records, its report. The other ranks serve: each
call that rank 0 makes through `launch` or `Ranks` runs on all of them, as it does on ranks that a
notebook starts, and rank 0 takes part as rank 0. So a loop that stops by the clock is run once,
and nothing has to be decided by every rank alike.

Whoever can reach the rendezvous can run code here, as with torch.distributed itself: the network
between the nodes must be trusted.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.rendezvous import rendezvous

from pardemo.cluster import knock, serving
from pardemo.cluster.torchrun import die_with_parent
from pardemo.launch import torchrun
from pardemo.machine import machine, spread_over
from pardemo.parameters import Refused

SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID",
         "GROUP_RANK": "SLURM_NODEID"}  # fmt: skip
JOIN_S = 300.0
KERNEL = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Place:
    """Where a rank lives: its node's number and name, the kernel it runs on, its devices."""

    node: int
    host: str
    kernel: str
    devices: int
    card: str

    @classmethod
    def here(cls) -> Place:
        """This process's. Nodes that share a kernel share their cores: they are one machine."""
        kernel = KERNEL.read_text().strip() if KERNEL.exists() else socket.gethostname()
        mine = machine()
        node = int(os.environ.get("GROUP_RANK", "0"))
        return cls(node, socket.gethostname(), kernel, mine.devices, mine.card())


def translate_slurm() -> None:
    """Say in torch's variables what srun says in its own; MASTER_ADDR and _PORT are the job's."""
    if "MASTER_ADDR" in os.environ:
        for name, slurm in SLURM.items():
            if name not in os.environ and slurm in os.environ:
                os.environ[name] = os.environ[slurm]


def given() -> bool:
    """Whether this process is one rank of a world that torchrun or srun made."""
    translate_slurm()
    return torchrun.active()


class World:
    """This process's place in the world, and the store that all its ranks share."""

    def __init__(self) -> None:
        die_with_parent()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        knock.at_master(JOIN_S)
        joining = rendezvous("env://", timeout=timedelta(seconds=JOIN_S))
        self.store, self.rank, self.size = next(joining)
        self.places = self._exchange(Place.here())

    def _exchange(self, mine: Place) -> list[Place]:
        """Every rank's place; from now on the machine card knows the other nodes."""
        self.store.set(f"place/{self.rank}", json.dumps(asdict(mine)))
        told = [self.store.get(f"place/{rank}") for rank in range(self.size)]
        places = [Place(**json.loads(one)) for one in told]
        cards = {place.node: f"node {place.node}, {place.host}\n{place.card}" for place in places}
        others = {place.kernel: place.devices for place in places if place.kernel != mine.kernel}
        spread_over(tuple(cards[node] for node in sorted(cards)), sum(others.values()))
        return places

    def __repr__(self) -> str:
        nodes = {place.node: place.host for place in self.places}
        return f"{self.size} ranks on {len(nodes)} nodes ({', '.join(nodes.values())})"


@contextlib.contextmanager
def joined() -> Iterator[int]:
    """Rank 0 gets 0 and drives in the body; another serves it first, then gets its number.

    Where nobody has made a world, the body gets 0 as if there were no such thing.
    """
    if not given():
        yield 0
        return
    world = World()
    if world.rank:
        serving.serve(world.store, world.rank, world.size)
        yield world.rank
        return
    print(f"world    {world}", flush=True)
    torchrun.driver = driver = serving.Driver(world.store, world.size)
    try:
        yield 0
        driver.end()
    except Exception:  # not where somebody stops us: then torchrun ends the others
        driver.end()
        raise
    finally:
        torchrun.driver = None


def driving() -> bool:
    """Whether this process drives a world."""
    return torchrun.driver is not None


def counts(parameters: Collection[str]) -> dict[str, Any]:
    """This world's number of ranks, for those of a benchmark's parameters that ask for it."""
    if torchrun.driver is None:
        return {}
    size = torchrun.driver.world_size
    if size < 2:
        raise Refused("a benchmark needs 2 ranks or more: torchrun --nproc-per-node 2, or 2 nodes")
    known = {"nprocs": size, "most_ranks": size, "world_sizes": str(size)}
    return {name: value for name, value in known.items() if name in parameters}
