"""`pardemo run`: train a workload with a strategy in the world that torchrun or Slurm gives.

The one program that the templates, the tests of Slurm and torchrun, and the lessons on clusters
start. It resumes from its newest good checkpoint, saves every so many steps, and rank 0 leaves one
JSON record: losses, where it resumed, the machine card of every node.
"""

from __future__ import annotations

import os
import re
import socket
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pardemo import strategies, workloads
from pardemo.cluster.checkpoint import Checkpoints
from pardemo.cluster.torchrun import die_with_parent, write_record
from pardemo.cluster.world import translate_slurm
from pardemo.machine import machine
from pardemo.parameters import Refused


@dataclass(frozen=True)
class Job:
    """What to train, for how long, and where its files go. `pause_s` slows steps down, for
    exercises in killing."""

    folder: str
    strategy: str = "ddp"
    workload: str = "mlp"
    steps: int = 20
    batch_size: int = 64
    save_every: int = 5
    timeout_s: float = 60.0
    pause_s: float = 0.0

    def check(self) -> None:
        """Refused for names and numbers that cannot be meant."""
        if self.strategy not in strategies.names():
            known = ", ".join(strategies.names())
            raise Refused(f"no strategy is called {self.strategy!r}; strategies are {known}")
        if not re.fullmatch(r"[A-Za-z_][\w.:-]*", self.workload):
            raise Refused(f"{self.workload!r} is not the name of a workload")
        for name in ("steps", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise Refused(f"{name} must be at least 1, not {getattr(self, name)}")


def run(job: Job) -> dict[str, Any]:
    """Train to `job.steps` on this process's rank; returns what rank 0 recorded (collective)."""
    job.check()
    _join(job.timeout_s)
    try:
        return _train(job)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _join(timeout_s: float) -> None:
    """Join the world of torchrun, or of srun; alone where there is neither."""
    translate_slurm()
    if "RANK" not in os.environ:
        return
    die_with_parent()
    backend = machine().backend
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


def _train(job: Job) -> dict[str, Any]:
    alone = not dist.is_initialized()
    rank = 0 if alone else dist.get_rank()
    work, row = workloads.workload(job.workload), strategies.get(job.strategy)
    step = row.build(work.make_model(rank), work.make_optimizer, work.loss, row.mesh())
    checkpoints = Checkpoints(Path(job.folder) / "checkpoints")
    found = checkpoints.load(step.model, step.optimizer)
    losses = list(found.extra["losses"]) if found else []
    began = time.perf_counter()
    for number in range(len(losses), job.steps):
        losses.append(float(step.step(work.make_batch(job.batch_size, number, 0))))
        if rank == 0:
            print(f"step {number + 1} loss {losses[-1]:.6f}", flush=True)
        if (number + 1) % job.save_every == 0 or number + 1 == job.steps:
            checkpoints.save(number + 1, step.model, step.optimizer, {"losses": losses})
        time.sleep(job.pause_s)
    elapsed_s = time.perf_counter() - began
    return _record(job, losses, found.step if found else 0, elapsed_s)


def _record(job: Job, losses: list[float], resumed: int, elapsed_s: float) -> dict[str, Any]:
    """What rank 0 writes down, with one machine card per node."""
    mine = (os.environ.get("GROUP_RANK", os.environ.get("SLURM_NODEID", "0")),
            socket.gethostname(), machine().card())  # fmt: skip
    everyone = [mine]
    if dist.is_initialized():
        everyone = [mine] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)  # moves one card per rank to every rank
    values = {
        "strategy": job.strategy, "workload": job.workload, "batch_size": job.batch_size,
        "world_size": len(everyone), "steps": job.steps, "resumed_at_step": resumed,
        "restarts": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        "elapsed_s": elapsed_s, "losses": losses,
        "nodes": {node: {"host": host, "card": card} for node, host, card in everyone},
    }  # fmt: skip
    if not dist.is_initialized() or dist.get_rank() == 0:
        path = write_record(Path(job.folder), f"record-{uuid.uuid4().hex}", values)
        print(f"record {path}", flush=True)
    return values
