"""The Slurm template on a real Slurm: a 2-node job, its record back, and its failures told."""

from __future__ import annotations

import json
import re
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from pardemo import records
from pardemo.cluster import doctor
from pardemo.cluster.templates import Plan, template
from tests.cluster.slurm import Slurm

ROOT = Path(__file__).parents[2]


def submit(slurm: Slurm, folder: Path, *program: str, options: Sequence[str] = ()) -> str:
    plan = Plan(
        nodes=2, gpus_per_node=0, cpus_per_rank=1, time="00:05:00", folder=str(folder),
        master="127.0.0.1", python=sys.executable, program=program, interface="lo",
    )  # fmt: skip
    script = folder / "job.sh"
    script.write_text(template("slurm", plan))
    clock = f"--export=ALL,TMPDIR={folder}"  # a timing lock of its own
    argv = ["sbatch", "--parsable", clock, f"--chdir={ROOT}", *options, str(script)]
    return slurm.run(*argv).strip()


def test_a_two_node_job_trains_and_leaves_its_record_though_its_port_is_taken(
    slurm: Slurm, tmp_path: Path
) -> None:
    words = ["-m", "pardemo.cluster", "run", "--folder", str(tmp_path), "--steps", "10"]
    before = int(slurm.run("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true"))
    slurm.run("scancel", str(before))
    with socket.create_server(("127.0.0.1", 20000 + (before + 1) % 10000)):
        job = submit(slurm, tmp_path, *words)
        assert int(job) == before + 1
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
def test_a_second_job_goes_on_where_the_first_ended(slurm: Slurm, tmp_path: Path) -> None:
    words = ["-m", "pardemo.cluster", "run", "--folder", str(tmp_path), "--steps"]
    for steps in ("5", "8"):
        assert slurm.wait(submit(slurm, tmp_path, *words, steps))["JobState"] == "COMPLETED"
    resumed = [json.loads(p.read_text())["resumed_at_step"] for p in tmp_path.glob("record-*.json")]
    assert sorted(resumed) == [0, 5]


def test_a_job_that_fails_is_never_completed(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "fail.py").write_text("raise SystemExit(3)\n")
    job = submit(slurm, tmp_path, str(tmp_path / "fail.py"))
    state = slurm.wait(job)
    assert state["JobState"] == "FAILED"
    assert state["ExitCode"] != "0:0"


def test_a_drained_node_is_waited_for_and_the_doctor_names_it(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "ok.py").write_text("print('ran')\n")
    slurm.run("scontrol", "update", "nodename=n2", "state=drain", "reason=planted")
    job = submit(slurm, tmp_path, str(tmp_path / "ok.py"))
    deadline = time.monotonic() + 30
    while (why := slurm.run("squeue", "-h", "-j", job, "-o", "%T %r").strip()) == "PENDING None":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert why.startswith("PENDING "), why
    (finding,) = doctor.slurm(slurm.env)
    assert "nothing on node n2: it is drained (planted); jobs that need it stay" in finding.text
    assert "scontrol update nodename=n2 state=resume" in finding.remedy
    slurm.run("scontrol", "update", "nodename=n2", "state=resume")
    deadline = time.monotonic() + 60
    while slurm.state(job)["JobState"] not in ("RUNNING", "COMPLETED"):
        assert time.monotonic() < deadline, slurm.state(job)
        time.sleep(0.2)
    slurm.run("scancel", job)
    slurm.wait(job)
    assert gone(slurm)
    assert [str(one) for one in doctor.slurm(slurm.env)] == ["ok    Slurm can use its 2 nodes"]


SLOW = ["--pause-s", "0.2", "--save-every", "4000"]  # only the signal makes it save


@pytest.mark.parametrize(
    "turn", [1, 2, 3, *(pytest.param(n, marks=pytest.mark.soak) for n in range(4, 21))]
)
def test_a_job_told_of_its_time_limit_saves_and_comes_back_and_cancelled_leaves_no_process(
    slurm: Slurm, tmp_path: Path, turn: int
) -> None:
    words = ["-m", "pardemo.cluster", "run", "--folder", str(tmp_path), "--steps", "4000"]
    job = submit(slurm, tmp_path, *words, *SLOW)
    output = tmp_path / f"slurm-{job}.out"
    until(output, "step 3 ")
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the limit
    until(output, "SIGUSR1: saved after step ")
    deadline = time.monotonic() + 60
    while slurm.state(job)["Restarts"] == "0":
        assert time.monotonic() < deadline, (slurm.state(job), output.read_text())
        time.sleep(0.2)
    (saved,) = re.findall(r"saved after step (\d+)", output.read_text())
    assert (tmp_path / "checkpoints" / f"step-{int(saved):08d}").is_dir()
    until(output, f"step {int(saved) + 1} loss")
    slurm.run("scancel", job)
    assert slurm.wait(job)["JobState"] == "CANCELLED"
    assert gone(slurm)


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_a_job_that_meets_its_time_limit_goes_on_where_it_was(slurm: Slurm, tmp_path: Path) -> None:
    words = ["-m", "pardemo.cluster", "run", "--folder", str(tmp_path), "--steps", "200"]
    limit = ["--time=1", "--signal=B:USR1@30"]  # one minute, told in its first half
    job = submit(slurm, tmp_path, *words, *SLOW[:2], options=limit)
    state = slurm.wait(job, 350)
    output = (tmp_path / f"slurm-{job}.out").read_text()
    assert state["JobState"] == "COMPLETED", output
    assert int(state["Restarts"]) >= 1
    (path,) = tmp_path.glob("record-*.json")
    record = json.loads(path.read_text())
    saved = re.findall(r"SIGUSR1: saved after step (\d+)", output)
    assert record["resumed_at_step"] == int(saved[-1])
    assert len(record["losses"]) == 200


BENCH = [
    "-m", "pardemo", "bench", "collectives", "-p", "kinds", "send", "-p", "largest", "32768",
    "-p", "rounds", "2", "-p", "seconds", "1", "-p", "pipelined", "1",
]  # fmt: skip


@pytest.mark.soak
def test_a_benchmark_runs_as_a_job_over_its_two_nodes(slurm: Slurm, tmp_path: Path) -> None:
    results = tmp_path / "results"
    job = submit(slurm, tmp_path, *BENCH, "--results", str(results))
    state = slurm.wait(job, 240)
    output = (tmp_path / f"slurm-{job}.out").read_text()
    assert state["JobState"] == "COMPLETED", output
    assert "world    2 ranks on 2 nodes" in output
    (run,) = records.open(results / "pardemo.sqlite").runs()
    cards = run.environment["machine"]["nodes"]
    assert [re.match(r"node (\d), ", card)[1] for card in cards] == ["0", "1"]  # type: ignore[index]
    assert len(list(results.glob("*/report.html"))) == 1


def until(path: Path, words: str, seconds: float = 120.0) -> None:
    """Wait until a job has printed `words`."""
    deadline = time.monotonic() + seconds
    while not (path.exists() and words in path.read_text()):
        assert time.monotonic() < deadline, path.read_text() if path.exists() else "no output"
        time.sleep(0.2)


def gone(slurm: Slurm) -> bool:
    """Whether no process of a job is left on any node within 15 s."""
    for _ in range(75):
        if not slurm.tasks("n1") and not slurm.tasks("n2"):
            return True
        time.sleep(0.2)
    return False


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_srun_alone_makes_a_world_too(slurm: Slurm, tmp_path: Path) -> None:
    meet = f"ALL,MASTER_ADDR=127.0.0.1,MASTER_PORT=28931,GLOO_SOCKET_IFNAME=lo,TMPDIR={tmp_path}"
    argv = ["srun", "-N2", "-n2", f"--export={meet}", f"--chdir={ROOT}", sys.executable, *BENCH]
    said = slurm.run(*argv, "--results", str(tmp_path / "results"), timeout=240)
    assert "world    2 ranks on 2 nodes" in said


@pytest.mark.soak
def test_without_its_controller_slurm_says_so(slurm: Slurm, tmp_path: Path) -> None:
    daemon = slurm.processes[1]
    daemon.terminate()
    daemon.wait(20)
    with pytest.raises(AssertionError, match=r"(?i)unable to contact|connect failure|refused"):
        submit(slurm, tmp_path, "-c", "pass")
