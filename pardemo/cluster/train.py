"""`pardemo run`: train a workload with a strategy in the world that torchrun or Slurm gives.

The one program that the templates, the tests of Slurm and torchrun, and the lessons on clusters
start. It resumes from its newest good checkpoint, saves every so many steps, and rank 0 leaves one
JSON record: losses, where it resumed, the machine card of every node. SIGUSR1, which Slurm sends
before the time limit, has it save and end with status 85: not done, to be started again.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pardemo import strategies, workloads
from pardemo.cluster import knock
from pardemo.cluster.checkpoint import Checkpoints
from pardemo.cluster.torchrun import (
    die_with_parent,
    kill_stopped_siblings,
    limit_collectives,
    write_record,
)
from pardemo.cluster.world import translate_slurm
from pardemo.machine import machine
from pardemo.parameters import Refused

LONGEST_S = 10_000_000  # a limit beyond it is a mistake, and torch's clock overflows
UNFINISHED = 85  # the exit status of a training that was told to save and end
# What gloo and nccl say of a rank that is gone, or that stands still
LOST = r"(?i)timed out waiting|closed by peer|reset by peer|broken pipe|collective.*time(d )?out"


@dataclass(frozen=True)
class Job:
    """What to train, for how long, and where its files go. `timeout_s` limits one collective once
    the ranks have met, which may take `join_s`. `pause_s` slows steps down, for exercises in
    killing."""

    folder: str
    strategy: str = "ddp"
    workload: str = "mlp"
    steps: int = 20
    batch_size: int = 64
    save_every: int = 5
    timeout_s: float = 60.0
    join_s: float = 60.0
    pause_s: float = 0.0

    def check(self) -> None:
        """Refused for names and numbers that cannot be meant."""
        if not self.folder.strip():
            raise Refused(f"--folder: {self.folder!r} names no folder; '.' is the current one")
        if self.strategy not in strategies.names():
            known = ", ".join(strategies.names())
            raise Refused(f"no strategy is called {self.strategy!r}; strategies are {known}")
        if not re.fullmatch(r"[A-Za-z_][\w.:-]*", self.workload):
            raise Refused(f"{self.workload!r} is not the name of a workload")
        for name in ("steps", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise Refused(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("timeout_s", "join_s"):
            if not getattr(self, name) > 0:
                raise Refused(f"{name} must be more than 0 seconds, not {getattr(self, name):g}")
        if not self.pause_s >= 0:
            raise Refused(f"pause_s must be 0 seconds or more, not {self.pause_s:g}")
        for name in ("timeout_s", "join_s", "pause_s"):
            if getattr(self, name) > LONGEST_S:
                raise Refused(f"{name} must be at most {LONGEST_S:,} s, not {getattr(self, name)}")
        workloads.workload(self.workload)  # Refused where there is none: before anything is written
        for folder in (Path(self.folder), Path(self.folder) / "checkpoints"):
            _writable(folder)


def _writable(folder: Path) -> None:
    """Make the folder and write a file there; Refused where that fails."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        raise Refused(
            f"nothing can be written into {str(folder)!r}: {error.strerror}; "
            "give --folder one where you may"
        ) from None


class Told:
    """Whether SIGUSR1 has come to any rank: then all of them stop after the same step."""

    def __init__(self) -> None:
        self.here = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[Told]:
        """Inside, the signal is a wish, not the end of this process."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.signal(signal.SIGUSR1, self._hear)
        try:
            yield self
        finally:
            signal.signal(signal.SIGUSR1, before)

    def _hear(self, *_: object) -> None:
        self.here = True

    def anywhere(self) -> bool:
        """Whether any rank was told (collective)."""
        if not dist.is_initialized():
            return self.here
        flag = torch.tensor([float(self.here)], device=machine().device_type)
        dist.all_reduce(flag, dist.ReduceOp.MAX)  # moves 2(n-1)/n * 4 bytes per rank
        return bool(flag.item())


def run(job: Job) -> dict[str, Any]:
    """Train to `job.steps` on this process's rank; returns what rank 0 recorded (collective).

    Nothing is recorded, and {} returned, where SIGUSR1 ended the training after a checkpoint.
    """
    job.check()
    with Told().listening() as told:
        _join(job.join_s)
        try:
            return _train(job, told)
        except Exception as error:
            kill_stopped_siblings()
            if re.search(LOST, str(error)) and dist.is_initialized():
                raise RuntimeError(_alone(job, str(error))) from error
            raise
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _join(join_s: float) -> None:
    """Join the world of torchrun, or of srun; alone where there is neither."""
    translate_slurm()
    if "RANK" not in os.environ:
        return
    die_with_parent()
    backend = machine().backend
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    knock.at_master(join_s)
    dist.init_process_group(backend, timeout=timedelta(seconds=join_s))


def _alone(job: Job, words: str) -> str:
    """What a rank says that hears another one no longer: one line, with what to do."""
    saved = [path.name for path in Path(job.folder, "checkpoints").glob("step-*[0-9]")]
    newest = f"from {max(saved)}" if saved else "from the beginning"
    last = words.strip().splitlines()[0].rpartition("] ")[2].partition(". ")[0][:150]
    what = f"start the job again, and it goes on {newest}"
    if job_id := os.environ.get("SLURM_JOB_ID"):
        what = (
            f"Slurm puts a job whose node is lost back into the queue, and it goes on {newest}; "
            f"squeue -j {job_id} -o '%T %r' says what it waits for, pardemo doctor which node is "
            "down. Where the node is there, submit the job again"
        )
    return (
        f"rank {dist.get_rank()} on {socket.gethostname()} hears another rank no longer ({last}): "
        f"its process or node has ended, or stands still; the other nodes say which. {what}"
    )


def _train(job: Job, told: Told) -> dict[str, Any]:
    alone = not dist.is_initialized()
    rank = 0 if alone else dist.get_rank()
    work, row = workloads.workload(job.workload), strategies.get(job.strategy)
    step = row.build(work.make_model(rank), work.make_optimizer, work.loss, row.mesh())
    checkpoints = Checkpoints(Path(job.folder) / "checkpoints")
    limit_collectives(job.timeout_s)
    found = checkpoints.load(step.model, step.optimizer)
    losses = list(found.extra["losses"]) if found else []
    began = time.perf_counter()
    for number in range(len(losses), job.steps):
        losses.append(float(step.step(work.make_batch(job.batch_size, number, 0))))
        if rank == 0:
            print(f"step {number + 1} loss {losses[-1]:.6f}", flush=True)
        done, ends = number + 1, told.anywhere()
        if ends or done % job.save_every == 0 or done == job.steps:
            checkpoints.save(done, step.model, step.optimizer, {"losses": losses})
        if ends and done < job.steps:
            if rank == 0:
                print(f"SIGUSR1: saved after step {done}; start it again", flush=True)
            return {}
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
