"""Slurm's jobs when a node or a process is killed at a random moment of the training."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.slurm import Slurm
from tests.cluster.test_slurm import gone, submit, until

STEPS = 60
SEEDS = [*range(3), *(pytest.param(n, marks=pytest.mark.soak) for n in range(3, 20))]


def started(slurm: Slurm, folder: Path, chance: random.Random) -> tuple[str, int]:
    """A job that has come to a random moment of its training, and the step it has done."""
    words = ["-m", "pardemo.cluster", "run", "--folder", str(folder), "--steps", str(STEPS)]
    job, step = submit(slurm, folder, *words, "--pause-s", "0.2"), chance.randint(1, 45)
    until(folder / f"slurm-{job}.out", f"step {step} ")
    time.sleep(chance.uniform(0, 0.2))
    return job, step


def went_on(slurm: Slurm, folder: Path, job: str, step: int) -> bool:
    """Whether the job ends well; what was saved before `step` was not done again."""
    state = slurm.wait(job, 200)
    output = (folder / f"slurm-{job}.out").read_text()
    assert state["JobState"] == "COMPLETED", output
    (path,) = folder.glob("record-*.json")
    record = json.loads(path.read_text())
    assert record["resumed_at_step"] >= step - 5
    assert len(record["losses"]) == STEPS
    return output.count(f"step {STEPS} loss") == 1


@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_job_whose_node_dies_comes_back_and_goes_on(
    slurm: Slurm, tmp_path: Path, seed: int
) -> None:
    """The node is back at once: what Slurm still has for its old step must not end the new one."""
    chance = random.Random(seed)
    job, step = started(slurm, tmp_path, chance)
    lost = chance.choice(["n1", "n2"])  # n1 runs the batch script too
    slurm.lose_node(lost)
    deadline = time.monotonic() + 120
    while slurm.state(job)["Restarts"] == "0":
        assert time.monotonic() < deadline, slurm.state(job)
        time.sleep(0.5)
    slurm.start_node(lost)
    assert went_on(slurm, tmp_path, job, step)


def processes(slurm: Slurm) -> dict[str, psutil.Process]:
    """What a job consists of, without Slurm's own helpers: its script, its srun, per node an agent
    of torchrun and a rank."""
    found = {}
    for node in ("n1", "n2"):
        for process in slurm.tasks(node):
            line = " ".join(process.cmdline())
            if "torch.distributed.run" in line:
                found[f"agent {node}"] = process
            elif "pardemo.cluster" in line and process.name() != "srun":
                found[f"rank {node}"] = process
            elif line.endswith("slurm_script"):
                found["script"] = process
    (found["srun"],) = (p for p in found["script"].children() if p.name() == "srun")
    return found


@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_job_of_which_a_process_is_killed_fails_and_goes_on_when_submitted_again(
    slurm: Slurm, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    job, step = started(slurm, tmp_path, chance)
    there = processes(slurm)
    assert sorted(there) == ["agent n1", "agent n2", "rank n1", "rank n2", "script", "srun"]
    victim = chance.choice(sorted(there))
    there[victim].kill()
    assert slurm.wait(job)["JobState"] == "FAILED", victim
    assert gone(slurm), victim
    words = ["-m", "pardemo.cluster", "run", "--folder", str(tmp_path), "--steps", str(STEPS)]
    assert went_on(slurm, tmp_path, submit(slurm, tmp_path, *words), step)
