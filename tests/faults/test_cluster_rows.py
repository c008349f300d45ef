"""The fault matrix past one machine: torchrun's agents and workers, nodes, and their rendezvous.

Numbers in names are rows of the matrix. Kills of a worker that a restart mends, and of an agent,
are in tests/cluster/test_torchrun.py; Slurm's rows in test_slurm.py; checkpoints' in
test_checkpoint.py.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pardemo.cluster import Nodes, knock, torchrun
from pardemo.cluster.checkpoint import Checkpoints
from pardemo.cluster.templates import Plan, template
from pardemo.launch import launch
from tests.cluster.agents import PROGRAM, ROOT, Agent, gone, record, undisturbed_losses
from tests.faults.harness import nothing_left

TRAINING = [*PROGRAM, "--timeout-s", "8"]
LONG = ["-m", "pardemo.cluster", "run", "--steps", "4000", "--pause-s", "0.05", "--timeout-s", "8"]
AGENTS = """
import pathlib
for file in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    if b"torch.distributed.run" in file.read_bytes().split(b"\\0"):
        print(file)
"""
LO = {**torchrun.ENVIRONMENT, "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return undisturbed_losses(tmp_path_factory.mktemp("alone"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def survives_a_kill(folder: Path, seed: int, undisturbed: list[float]) -> None:
    """Row 16: SIGKILL of a random worker at a random moment of the training."""
    chance = random.Random(seed)
    agent = Agent(folder, program=TRAINING, max_restarts=1)
    agent.until(f"step {chance.randint(1, 36)} ")
    time.sleep(chance.uniform(0, 0.05))
    os.kill(chance.choice(agent.workers()), signal.SIGKILL)
    code, text = agent.end()
    assert code == 0, text[-3000:]
    told = record(folder)
    assert told["restarts"] == 1
    assert told["losses"] == pytest.approx(undisturbed, abs=1e-5)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_16_a_worker_killed_at_a_random_moment_costs_nothing(
    tmp_path: Path, undisturbed: list[float], seed: int
) -> None:
    survives_a_kill(tmp_path, seed, undisturbed)


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(4, 24))
def test_16_twenty_times(tmp_path: Path, undisturbed: list[float], seed: int) -> None:
    survives_a_kill(tmp_path, seed, undisturbed)


def survives_a_hang(folder: Path, seed: int, undisturbed: list[float]) -> None:
    """Row 18: SIGSTOP of a random worker at a random moment, of a step or of a save."""
    chance = random.Random(seed)
    program = [*PROGRAM[:-1], "0.02", "--save-every", "2", "--timeout-s", "3"]
    agent = Agent(folder, program=program, max_restarts=1, shutdown_timeout_s=3)
    agent.until(f"step {chance.randint(1, 36)} ")
    time.sleep(chance.uniform(0, 0.02))
    os.kill(chance.choice(agent.workers()), signal.SIGSTOP)
    code, text = agent.end()
    assert code == 0, text[-3000:]
    assert record(folder)["restarts"] == 1
    assert record(folder)["losses"] == pytest.approx(undisturbed, abs=1e-5)
    assert "Unable to shutdown process" not in text, "torchrun had to wait for its own 30 s"


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "seed", [1, 2, 3, *(pytest.param(n, marks=pytest.mark.soak) for n in range(4, 21))]
)
def test_18_a_stopped_worker_is_found_and_the_run_goes_on(
    tmp_path: Path, undisturbed: list[float], seed: int
) -> None:
    survives_a_hang(tmp_path, seed, undisturbed)


def limits_of_groups() -> list[float]:
    """Of the default group and the checkpoints' own, then of both when they are limited."""
    groups = [dist.group.WORLD, Checkpoints("unused").world.group]
    limits = []
    for limit_s in (None, 3):
        if limit_s:
            torchrun.limit_collectives(limit_s)
        backends = [group._get_backend(torch.device("cpu")) for group in groups]
        limits += [backend.options._timeout.total_seconds() for backend in backends]
    return limits


def test_18_no_group_waits_for_30_minutes() -> None:
    """torch gives them to every group but the first, whatever the first was given."""
    first, saving, *limited = launch(limits_of_groups, nprocs=2, timeout=25)[1]
    assert first == saving < 100
    assert limited == [3, 3]


@pytest.mark.twenty(3)
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name
)
def test_18_a_signal_to_the_agent_ends_everything(tmp_path: Path, number: signal.Signals) -> None:
    with nothing_left(tmp_path, within_s=10):
        folder = tmp_path / "run"
        folder.mkdir()
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}  # torch's own, one per user
        agent = Agent(folder, {**torchrun.ENVIRONMENT, **cache}, program=LONG)
        agent.until("step 3 ")
        workers = agent.workers()
        agent.process.send_signal(number)
        code, _ = agent.end(30)
        assert code != 0
        assert len(workers) == 2
        assert gone(workers)


def two_agents(folder: Path, program: list[str]) -> list[Agent]:
    """Two agents of one worker each, as on two nodes."""
    meet = {"nnodes": 2, "nprocs": 1, "master_port": free_port(), "program": program}
    return [Agent(folder, LO, node_rank=rank, **meet) for rank in range(2)]


def loses_a_node(folder: Path, lost: int, words: str, after_s: float, program: list[str]) -> None:
    """Row 19: SIGKILL of an agent with its worker, as when a node loses its power."""
    agents = two_agents(folder, program)
    agents[0].until(words)
    time.sleep(after_s)
    for pid in (*agents[lost].workers(), agents[lost].process.pid):
        os.kill(pid, signal.SIGKILL)
    agents[lost].end()
    code, text = agents[1 - lost].end(60)
    assert code not in (0, -signal.SIGKILL), "the survivor had to be killed"
    assert f"rank {1 - lost} on {socket.gethostname()} hears another rank no longer" in text
    assert "start the job again, and it goes on from " in text


@pytest.mark.twenty(3)
@pytest.mark.timeout(200)
def test_19_when_a_node_is_lost_the_other_agent_ends(tmp_path: Path) -> None:
    loses_a_node(tmp_path, 1, "step 3 ", 0.0, LONG)


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(20))
def test_19_a_lost_node_costs_nothing_that_was_saved(
    tmp_path: Path, undisturbed: list[float], seed: int
) -> None:
    chance = random.Random(seed)
    step, lost = chance.randint(1, 36), chance.randrange(2)
    loses_a_node(tmp_path, lost, f"step {step} ", chance.uniform(0, 0.05), TRAINING)
    for agent in two_agents(tmp_path, TRAINING):
        code, text = agent.end()
        assert code == 0, text[-3000:]
    assert record(tmp_path)["resumed_at_step"] >= step - 5
    assert record(tmp_path)["losses"] == pytest.approx(undisturbed, abs=1e-5)


@pytest.fixture
def lab(request: pytest.FixtureRequest) -> Iterator[Nodes]:
    from pardemo.cluster import reasons_against

    if against := reasons_against():
        pytest.skip(f"no node lab: {against[0]}")
    with Nodes(2) as nodes:
        yield nodes


@pytest.mark.timeout(200)
def test_20_a_pulled_cable_ends_at_the_outer_deadline(lab: Nodes, tmp_path: Path) -> None:
    words = [*LONG, "--folder", str(tmp_path)]
    lab.plug(1, False)
    with pytest.raises(subprocess.TimeoutExpired):
        torchrun.run_on_nodes(lab, words, tmp_path / "logs", timeout=8)
    lab.plug(1, True)
    for _ in range(50):
        if not (left := lab.run(0, [sys.executable, "-I", "-c", AGENTS]).stdout.strip()):
            break
        time.sleep(0.1)
    assert left == ""
    short = [*PROGRAM[:3], "--steps", "2", "--folder", str(tmp_path)]
    done = torchrun.run_on_nodes(lab, short, tmp_path / "logs", timeout=150)
    assert [one.returncode for one in done] == [0, 0], done[0].stdout


def joining(tmp_path: Path, node_rank: int, port: int) -> tuple[int, str, str]:
    """How an agent of two ends, what torchrun printed, and what we say to that."""
    program = tmp_path / "x.py"
    program.write_text("")
    agent = Agent(
        tmp_path, LO, nprocs=1, program=[str(program)], nnodes=2, node_rank=node_rank,
        master_port=port, join_timeout_s=3,
    )  # fmt: skip
    code, text = agent.end(100)
    return code, text, torchrun.why(text)


@pytest.mark.timeout(200)
def test_21_nobody_hosts_the_rendezvous(tmp_path: Path) -> None:
    port = free_port()
    code, text, said = joining(tmp_path, 1, port)
    assert code == 1, text
    assert f"nobody answers at (127.0.0.1, {port}): start the agent of node 0" in said


@pytest.mark.timeout(60)
def test_21_a_rank_says_soon_that_rank_0_does_not_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    world = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    argv = [sys.executable, *LONG, "--folder", str(tmp_path), "--join-s", "1"]
    done = subprocess.run(
        argv, cwd=ROOT, env={**os.environ, **world}, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"pardemo: nobody answers at 127.0.0.1:{port} after 1 s")
    assert "start rank 0 there, or correct MASTER_ADDR" in done.stderr
    assert done.stderr.count("\n") == 1
    with pytest.raises(RuntimeError, match=r"nobody\.invalid has no address here .* --local-addr="):
        knock.at("nobody.invalid", port, limit_s=0.1)
    with pytest.raises(RuntimeError, match="nobody answers"):
        knock.at("127.0.0.1", port, limit_s=0.5, say_after_s=0.1)
    assert capsys.readouterr().err.count("waiting for") == 1
    with socket.create_server(("127.0.0.1", port)):
        knock.at("127.0.0.1", port, limit_s=0.5)


@pytest.mark.timeout(60)
def test_21_the_script_says_soon_that_node_0_does_not_answer(tmp_path: Path) -> None:
    port = free_port()
    plan = Plan(master="127.0.0.1", port=port, folder=str(tmp_path), python="false")
    environment = {**os.environ, "JOIN_S": "11", "SECONDS": "9"}  # as if it had waited for 9 s
    done = subprocess.run(
        ["bash", "-s", "1"], input=template("torchrun", plan), env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    waiting, gave_up = done.stderr.splitlines()
    for line in (waiting, gave_up):
        assert line.startswith(f"nobody answers at 127.0.0.1:{port}: start this script with 0")
    assert "waiting for 11 s, see JOIN_S" in waiting
    assert "gave up after 1" in gave_up


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("program", "says"), [("exec sleep 4", 1), ("sleep 4 & wait", 0)])
def test_21_the_script_says_beside_torchrun_that_no_rank_has_started(
    tmp_path: Path, program: str, says: int
) -> None:
    """A torchrun that waits has no child yet, one whose nodes have come has its ranks."""
    torchruns = tmp_path / "python"
    torchruns.write_text(f"#!/bin/bash\n{program}\n")
    torchruns.chmod(0o755)
    script = template("torchrun", Plan(folder=str(tmp_path), python=str(torchruns)))
    done = subprocess.run(
        ["bash", "-s", "0"], input=script, env={**os.environ, "SAY_S": "1"}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no rank runs here after 1 s: torchrun waits for other nodes") == says


@pytest.mark.timeout(200)
def test_21_the_port_is_busy(tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        code, text, said = joining(tmp_path, 0, taken.getsockname()[1])
    assert code == 1, text
    assert said == "the port is taken on node 0: choose another --master-port"


@pytest.mark.soak
@pytest.mark.timeout(200)
def test_21_the_other_nodes_never_come(tmp_path: Path) -> None:
    code, text, said = joining(tmp_path, 0, free_port())
    assert code == 1, text
    assert "1/2 agents came: start the others" in said


def test_what_torchrun_prints_and_nobody_knows_is_not_explained() -> None:
    assert torchrun.why("Traceback: KeyError: 'x'") == ""
    assert torchrun.why("Signal 9 (SIGKILL) received by PID 77").startswith("process 77 was killed")
    assert ROOT.is_dir()
