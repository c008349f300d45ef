"""launch() under torchrun: the processes exist already, so run the function in this one."""

from __future__ import annotations

import atexit
import os
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pardemo.launch import pickling
from pardemo.launch.rank import seed_all
from pardemo.launch.results import Results
from pardemo.launch.servers import in_kernel
from pardemo.launch.session import Setup

driver: Any = None  # set where this process drives torchrun's world and the others serve it


def active() -> bool:
    """Whether a launcher like torchrun started this process as one rank of a world.

    Never in a notebook's kernel, where the variables may be left over from an experiment.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(name in os.environ for name in names) and not in_kernel()


def run(
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    nprocs: int | None,
    setup: Setup,
) -> Results:
    """Run `fn` here as this process's rank; every rank gets the values of all."""
    began = time.monotonic()
    world = int(os.environ["WORLD_SIZE"])
    rank = int(os.environ["RANK"])
    if nprocs not in (None, world) and rank == 0:
        warnings.warn(f"torchrun has {world} ranks; nprocs={nprocs} is ignored", stacklevel=3)
    if not dist.is_initialized() and setup.backend != "none":
        _join(setup)
    torch.set_num_threads(setup.threads)
    seed_all(setup.seed, rank)
    ready_s = time.monotonic() - began
    value = fn(*args, **kwargs)
    parts, _ = pickling.pack(value, f"the value rank {rank} returned", detach=True)
    gathered: list[Any] = [None] * world
    mine = [bytes(part) for part in parts]
    dist.all_gather_object(gathered, mine)  # moves every rank's pickled value to every rank
    values = tuple(pickling.unpack([bytearray(part) for part in parts]) for parts in gathered)
    done_s = time.monotonic() - began
    backend = dist.get_backend()
    return Results(values, world, setup.threads, backend, ready_s, done_s, ("",) * world)


def _join(setup: Setup) -> None:
    """Join torchrun's world; the group stays for later calls, until the process ends."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    limit = timedelta(seconds=setup.timeout) if setup.timeout else None
    dist.init_process_group(setup.backend or None, timeout=limit)
    atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
