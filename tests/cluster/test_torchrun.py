"""Under torchrun a killed worker costs a restart and nothing else; a killed agent leaves nobody."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from pardemo import cli
from pardemo.cluster import Nodes, torchrun
from pardemo.cluster.train import UNFINISHED, Job, run
from pardemo.parameters import Refused
from tests.cluster.agents import PROGRAM, Agent, record, undisturbed_losses

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return undisturbed_losses(tmp_path_factory.mktemp("alone"))


def test_a_killed_worker_is_restarted_and_ends_with_the_same_losses(
    tmp_path: Path, undisturbed: list[float]
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {**torchrun.ENVIRONMENT, "TMPDIR": str(temporary)}
    agent = Agent(tmp_path, environment, max_restarts=1)
    agent.until("step 12 ")
    os.kill(agent.workers()[1], signal.SIGKILL)
    code, output = agent.end()
    assert code == 0, output[-3000:]
    told = record(tmp_path)
    assert (told["restarts"], told["world_size"]) == (1, 2)
    assert told["resumed_at_step"] >= 10
    assert told["losses"] == pytest.approx(undisturbed, abs=1e-5)
    assert "CPU" in told["nodes"]["0"]["card"]
    assert list(temporary.glob("torchelastic_*")) == []


@pytest.mark.parametrize(
    "seed", [0, 1, 2, *(pytest.param(n, marks=pytest.mark.soak) for n in range(3, 20))]
)
def test_a_killed_agent_leaves_no_worker(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    agent = Agent(tmp_path, torchrun.ENVIRONMENT)
    agent.until(f"step {chance.randint(1, 36)} ")
    workers = agent.workers()
    time.sleep(chance.uniform(0, 0.05))
    agent.process.kill()
    agent.end()
    assert len(workers) == 2
    for _ in range(100):
        if not any(Path(f"/proc/{pid}").exists() for pid in workers):
            return
        time.sleep(0.1)
    pytest.fail(f"workers {workers} outlived their agent by 10 s")


@pytest.mark.soak
def test_canary_says_when_torch_restarts_by_default_again(tmp_path: Path) -> None:
    """Without the setting most restarts fail in torch 2.13. It passes either way, and reports."""
    agent = Agent(tmp_path, {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0"}, max_restarts=1)
    agent.until("step 7 ")
    os.kill(agent.workers()[1], signal.SIGKILL)
    began = time.monotonic()
    while agent.process.poll() is None and time.monotonic() < began + 20:
        time.sleep(0.2)
    recovered = agent.process.poll() == 0
    agent.process.kill()
    agent.end()
    print(f"canary: a restart without TORCH_DISABLE_SHARE_RDZV_TCP_STORE worked: {recovered}")
    assert torchrun.ENVIRONMENT["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


@pytest.fixture
def slow_lab(lab_possible: None) -> Iterator[Nodes]:
    with Nodes(2, rate="100mbit") as nodes:
        yield nodes


def test_torchrun_on_two_nodes_trains_over_the_link(
    slow_lab: Nodes, tmp_path: Path, undisturbed: list[float]
) -> None:
    program = [*PROGRAM, "--pause-s", "0", "--folder", str(tmp_path)]
    done = torchrun.run_on_nodes(slow_lab, program, tmp_path / "logs")
    assert [one.returncode for one in done] == [0, 0], (
        done[0].stdout[-2000:] + done[1].stdout[-2000:]
    )
    told = record(tmp_path)
    assert {place["host"] for place in told["nodes"].values()} == {"node0", "node1"}
    assert told["losses"] == pytest.approx(undisturbed, abs=1e-5)
    assert min(slow_lab.tx_bytes()) > 40 * 4_000  # at least the gradients of 40 steps


def vanish(nodes: Nodes, node: int) -> None:
    """SIGKILL everything in a node's namespaces at once, so that the kernel removes them."""
    network = os.stat(f"/proc/{nodes.held.holder_pids[node]}/ns/net").st_ino
    stopped: set[int] = set()
    while new := {pid for pid in psutil.pids() if _network(pid) == network} - stopped:
        for pid in new:
            os.kill(pid, signal.SIGSTOP)
        stopped |= new
    for pid in stopped:
        os.kill(pid, signal.SIGKILL)


def _network(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    return None


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(20))
def test_a_node_that_vanishes_ends_the_run_and_costs_nothing_that_was_saved(
    lab_possible: None, tmp_path: Path, undisturbed: list[float], seed: int
) -> None:
    """At a random moment, every other one without a last packet, as when the power goes."""
    chance = random.Random(seed)
    lost, saved = chance.randrange(2), 5 * chance.randint(1, 7)
    program = [*PROGRAM, "--timeout-s", "8", "--folder", str(tmp_path)]
    with Nodes(2) as lab, ThreadPoolExecutor(1) as pool:
        running = pool.submit(torchrun.run_on_nodes, lab, program, tmp_path / "logs")
        while not (tmp_path / "checkpoints" / f"step-{saved:08d}").exists():
            assert not running.done(), running.result()
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.2))
        if seed % 2:
            lab.plug(lost, False)
        vanish(lab, lost)
        done = running.result()
        assert done[lost].returncode == -signal.SIGKILL
        assert done[1 - lost].returncode == 1, "the other had to be ended"
        assert "start the job again" in done[1 - lost].stdout
        asked = lab.run(lost, ["true"])
        assert (asked.returncode, asked.stderr.count("\n")) == (1, 1)
        assert "is gone: make a new lab" in asked.stderr
        assert lab.run(1 - lost, ["hostname"]).stdout.strip() == f"node{1 - lost}"
    with Nodes(2) as lab:
        done_again = torchrun.run_on_nodes(lab, program, tmp_path / "logs")
    assert [one.returncode for one in done_again] == [0, 0], done_again[0].stdout
    assert record(tmp_path)["resumed_at_step"] >= saved
    assert record(tmp_path)["losses"] == pytest.approx(undisturbed, abs=1e-5)


def test_the_command_refuses_numbers_that_cannot_be_meant(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="node_rank=2"):
        torchrun.command(["x.py"], 1, tmp_path, nnodes=2, node_rank=2)
    with pytest.raises(Refused, match="steps must be at least 1, not 0"):
        Job(str(tmp_path), steps=0).check()
    with pytest.raises(Refused, match="no strategy is called 'dpd'"):
        Job(str(tmp_path), strategy="dpd").check()
    with pytest.raises(Refused, match="not the name of a workload"):
        Job(str(tmp_path), workload="$(id)").check()
    with pytest.raises(Refused, match="pause_s must be 0 seconds or more, not -1"):
        Job(str(tmp_path), pause_s=-1).check()
    with pytest.raises(Refused, match="timeout_s must be more than 0 seconds, not 0"):
        Job(str(tmp_path), timeout_s=0).check()
    with pytest.raises(Refused, match="join_s must be more than 0 seconds, not nan"):
        Job(str(tmp_path), join_s=float("nan")).check()
    with pytest.raises(Refused, match="pause_s must be at most 10,000,000 s, not inf"):
        Job(str(tmp_path), pause_s=float("inf")).check()
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match=r"nothing can be written into '.*file'.*give --folder"):
        Job(str(tmp_path / "file")).check()
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "checkpoints").write_text("")
    with pytest.raises(Refused, match=r"nothing can be written into '.*job/checkpoints'"):
        Job(str(tmp_path / "job")).check()


def test_the_command_refuses_at_once_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = ["run", "--folder", str(tmp_path)]
    for more, said in (
        (["--pause-s", "-1"], "pause_s must be 0 seconds or more, not -1"),
        (["--timeout-s", "0"], "timeout_s must be more than 0 seconds, not 0"),
        (["--timeout-s", "1e300"], "timeout_s must be at most 10,000,000 s, not 1e+300"),
        (["--folder", str(tmp_path / "file")], "give --folder one where you may"),
    ):
        with contextlib.redirect_stderr(io.StringIO()) as told:
            assert cli.main([*words, *more]) == 2
        assert told.getvalue().count("\n") == 1
        assert said in told.getvalue()


def test_a_training_that_is_told_saves_and_goes_on_later(
    tmp_path: Path, undisturbed: list[float]
) -> None:
    words = ["-m", "pardemo.cluster", "run", "--steps", "40", "--save-every", "4000"]
    argv = [sys.executable, *words, "--strategy", "single", "--folder", str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen([*argv, "--pause-s", "0.05"], **pipes) as process:
        assert process.stdout is not None
        while "step 3 " not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGUSR1)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == UNFINISHED
    (step,) = re.findall(r"SIGUSR1: saved after step (\d+)", said)
    told = run(Job(str(tmp_path), strategy="single", steps=40))
    assert told["resumed_at_step"] == int(step)
    assert told["losses"] == pytest.approx(undisturbed, abs=1e-5)


def test_a_record_is_one_private_file(tmp_path: Path) -> None:
    path = torchrun.write_record(tmp_path / "new", "record-1", {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    assert path.stat().st_mode & 0o077 == 0
    assert re.fullmatch(r"record-1\.json", *(p.name for p in (tmp_path / "new").iterdir()))
