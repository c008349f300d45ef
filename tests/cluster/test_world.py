"""A world that torchrun made is driven by its rank 0: benchmarks run over its ranks, once."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from pardemo import records
from pardemo.cluster import Nodes, torchrun, world
from pardemo.launch import torchrun as launched
from pardemo.parameters import Refused
from pardemo.records import Store

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, **torchrun.ENVIRONMENT, "PYTHONPATH": str(ROOT)}
SMALL = ["-p", "model", "mlp", "-p", "batch_size", "16", "-p", "rounds", "2", "-p", "seconds", "1"]
STRATEGIES = ["strategies", *SMALL, "-p", "anatomy", "false", "-p", "strategies", "ddp"]
COLLECTIVES = [
    "collectives", "-p", "kinds", "send", "-p", "largest", "32768", "-p", "rounds", "2", "-p",
    "seconds", "1", "-p", "pipelined", "1",
]  # fmt: skip

PROGRAM = """
import os
import torch, torch.distributed as dist
from pardemo import Ranks, launch
from pardemo.cluster import world
from pardemo.launch import RankFailed
from pardemo.machine import machine

big = torch.zeros(3_000_000)  # 12 MB: more than the store takes in one piece

def total(value, counted):
    counted.append(1)  # a copy of the list, on rank 0 as well
    value = value + dist.get_rank()
    dist.all_reduce(value)  # moves 2(n-1)/n * bytes of value
    return os.getpid(), value, len(counted), dist.get_world_size()

def fail_on(rank):
    if dist.get_rank() == rank:
        raise KeyError("lost key")
    dist.barrier()

def remember(value):
    global kept
    kept = value + dist.get_rank()

def recall():
    return kept

with world.joined() as rank:
    if rank == 0:
        counted = []
        found = launch(total, big + 1, counted)
        pids = [pid for pid, *_ in found]
        assert pids[0] == os.getpid() and len(set(pids)) == 3, pids
        assert [float(v[-1]) for _, v, *_ in found] == [6.0] * 3
        assert [n for *_, n in found] == [3, 3, 3] and counted == []
        two = launch(total, torch.ones(1), [], nprocs=2, timeout=20)
        assert [(float(v), n) for _, v, _, n in two] == [(3.0, 2)] * 2
        try:
            launch(fail_on, 1, timeout=20)
        except RankFailed as error:
            print("blamed", error.rank, str(error).splitlines()[0])
        with Ranks(3) as ranks:
            ranks(remember, 5)
            print("kept", list(ranks(recall)))
            try:
                launch(total, big, [])
            except ValueError as error:
                print("refused:", error)
        try:
            launch(total, big, [], nprocs=4)
        except ValueError as error:
            print("refused:", error)
        print("nodes", len(machine().nodes), "ended", flush=True)
"""


def agents(program: list[str], folder: Path, sizes: list[int]) -> list[tuple[int, str]]:
    """Exit codes and outputs of one torchrun agent per entry of `sizes`, its number of ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        subprocess.Popen(
            torchrun.command(
                program, nprocs, folder / f"logs{node}", nnodes=len(sizes), node_rank=node,
                master_port=port,
            ),
            cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "lo", "TMPDIR": str(folder)},
            stdin=subprocess.DEVNULL,
        )
        for node, nprocs in enumerate(sizes)
    ]  # fmt: skip
    try:
        outputs = [agent.communicate(timeout=240)[0] for agent in started]
    finally:
        for agent in started:
            agent.kill()
            agent.wait()
    return [(agent.returncode, text) for agent, text in zip(started, outputs, strict=True)]


def store(folder: Path) -> Store:
    return records.open(folder / "results" / "pardemo.sqlite")


def test_rank_0_drives_and_the_others_serve(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    ((code, text),) = agents([str(tmp_path / "program.py")], tmp_path, [3])
    assert code == 0, text
    assert "world    3 ranks on 1 nodes" in text
    assert "blamed 1 rank 1 of 3 raised KeyError: 'lost key'" in text
    assert "kept [5, 6, 7]" in text
    assert "refused: under torchrun one group of ranks is open at a time" in text
    assert "refused: 4 ranks are wanted, this world has 3" in text
    assert text.count("nodes 1 ended") == 1


def test_a_benchmark_runs_over_the_ranks_of_two_agents(tmp_path: Path) -> None:
    found = agents(["-m", "pardemo", "bench", *STRATEGIES], tmp_path, [1, 1])
    assert [code for code, _ in found] == [0, 0], found[0][1] + found[1][1]
    text = found[0][1]
    assert "world    2 ranks on 2 nodes" in text
    assert "ddp: equal to one process" in text
    assert "The bytes sent equal the closed form in 1 of 1." in text
    assert "table" not in found[1][1]
    (report,) = (tmp_path / "results").glob("*/report.html")
    assert "data:image/png;base64" in report.read_text()
    (run,) = [row for row in store(tmp_path).runs() if row.name == "strategies"]
    assert run.parameters["nprocs"] == 2
    cards = run.environment["machine"]["nodes"]
    assert [re.match(r"node (\d), ", card)[1] for card in cards] == ["0", "1"]  # type: ignore[index]
    assert all("CPU" in card for card in cards)


@pytest.mark.soak
def test_a_benchmark_that_is_refused_ends_every_rank(tmp_path: Path) -> None:
    argv = ["-m", "pardemo", "bench", "collectives", "-p", "world_sizes", "4"]
    ((code, text),) = agents(argv, tmp_path, [2])
    assert code != 0
    assert "4 ranks are wanted, this world has 2" in text


def test_parameters_that_count_ranks_take_the_worlds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert world.counts(["nprocs"]) == {}
    for size in (6, 1):
        monkeypatch.setattr(launched, "driver", SimpleNamespace(world_size=size))
        if size > 1:
            assert world.counts(["model", "nprocs"]) == {"nprocs": 6}
            assert world.counts(["world_sizes", "most_ranks"]) == {
                "world_sizes": "6", "most_ranks": 6
            }  # fmt: skip
            continue
        with pytest.raises(Refused, match="needs 2 ranks or more"):
            world.counts(["nprocs"])


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_benchmark_runs_over_the_nodes_of_a_lab(
    lab_possible: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Nodes(2, rate="1gbit") as nodes:
        program = ["-m", "pardemo", "bench", *COLLECTIVES, "--results", str(tmp_path / "results")]
        monkeypatch.setenv("TMPDIR", str(tmp_path))  # a timing lock of its own
        done = torchrun.run_on_nodes(nodes, program, tmp_path / "logs", timeout=240)
        assert [one.returncode for one in done] == [0, 0], done[0].stdout + done[1].stdout
        assert min(nodes.tx_bytes()) > 100_000
    assert "2 ranks on 2 nodes (node0, node1)" in done[0].stdout


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["scaling", "collectives", "harness"])
def test_every_other_benchmark_that_takes_ranks_runs_too(tmp_path: Path, name: str) -> None:
    small = {
        "scaling": SMALL, "collectives": COLLECTIVES[1:],
        "harness": ["-p", "rounds", "6", "-p", "steps", "3", "-p", "width", "64"],
    }[name]  # fmt: skip
    ((code, text),) = agents(["-m", "pardemo", "bench", name, *small], tmp_path, [2])
    assert code == 0, text
