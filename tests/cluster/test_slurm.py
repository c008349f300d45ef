"""The Slurm template on a real Slurm: a 2-node job, its record back, and its failures told."""

from __future__ import annotations

import importlib.util
import json
import os
import pwd
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pardemo.cluster.templates import Plan, template

ROOT = Path(__file__).parents[2]


def _slurm_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("slurm", Path(__file__).parent / "slurm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def slurm(
    need: Callable[[str, str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    for tool in ("sbatch", "slurmctld", "slurmd", "munged"):
        need(tool, "slurm-wlm munge")
    os.environ["USER"] = pwd.getpwuid(os.geteuid()).pw_name
    running = _slurm_module().Slurm(tmp_path_factory.mktemp("slurm"))
    yield running
    running.stop()


def submit(slurm: Any, folder: Path, *program: str) -> str:
    plan = Plan(
        nodes=2, gpus_per_node=0, cpus_per_rank=1, time="00:05:00", folder=str(folder),
        master="127.0.0.1", python=sys.executable, program=program, interface="lo",
    )  # fmt: skip
    script = folder / "job.sh"
    script.write_text(template("slurm", plan))
    return slurm.run("sbatch", "--parsable", f"--chdir={ROOT}", str(script)).strip()


def test_a_two_node_job_trains_and_leaves_its_record(slurm: Any, tmp_path: Path) -> None:
    words = ["-m", "pardemo.cluster", "run", "--folder", str(tmp_path), "--steps", "10"]
    job = submit(slurm, tmp_path, *words)
    state = slurm.wait(job)
    output = (tmp_path / f"slurm-{job}.out").read_text()
    assert state["JobState"] == "COMPLETED", output
    (path,) = tmp_path.glob("record-*.json")
    record = json.loads(path.read_text())
    assert (record["world_size"], record["steps"], len(record["losses"])) == (2, 10, 10)
    assert sorted(record["nodes"]) == ["0", "1"]
    assert record["losses"][-1] < record["losses"][0]
    assert output.count("step 10 loss") == 1


@pytest.mark.soak
def test_a_second_job_goes_on_where_the_first_ended(slurm: Any, tmp_path: Path) -> None:
    words = ["-m", "pardemo.cluster", "run", "--folder", str(tmp_path), "--steps"]
    for steps in ("5", "8"):
        assert slurm.wait(submit(slurm, tmp_path, *words, steps))["JobState"] == "COMPLETED"
    resumed = [json.loads(p.read_text())["resumed_at_step"] for p in tmp_path.glob("record-*.json")]
    assert sorted(resumed) == [0, 5]


def test_a_job_that_fails_is_never_completed(slurm: Any, tmp_path: Path) -> None:
    (tmp_path / "fail.py").write_text("raise SystemExit(3)\n")
    job = submit(slurm, tmp_path, str(tmp_path / "fail.py"))
    state = slurm.wait(job)
    assert state["JobState"] == "FAILED"
    assert state["ExitCode"] != "0:0"
