"""Nodes are real: own interfaces, names and memory, a link of the asked rate, and nothing left."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pardemo import cli
from pardemo.cluster import Nodes, NodesError, holding
from pardemo.parameters import Refused

Need = Callable[[str, str], str]
ROOT = Path(__file__).parents[2]
STANDING = """
import sys, time
from pardemo.cluster import Nodes
nodes = Nodes(2, "1gbit")
loose = nodes.popen(0, ["sh", "-c", "setsid sleep 271 & sleep 272"])
print(nodes.held.hub_pid, *nodes.held.holder_pids, loose.pid, flush=True)
time.sleep(120)
"""


def interfaces() -> set[str]:
    return {entry["ifname"] for entry in json.loads(subprocess.check_output(["ip", "-j", "link"]))}


def gone(pids: list[int], within_s: float = 10.0) -> bool:
    for _ in range(int(within_s / 0.05)):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_each_node_has_its_own_name_address_and_memory(lab: Nodes) -> None:
    for node in range(2):
        assert lab.run(node, ["hostname"]).stdout.strip() == f"node{node}"
        shown = json.loads(lab.run(node, ["ip", "-j", "addr", "show", "eth0"]).stdout)
        assert shown[0]["addr_info"][0]["local"] == lab.addresses[node]
    lab.run(0, ["touch", "/dev/shm/mine"])
    assert lab.run(1, ["ls", "/dev/shm"]).stdout == ""
    assert lab.run(1, ["getent", "ahostsv4", "node0"]).stdout.split()[0] == lab.addresses[0]


def test_there_is_no_way_out_of_the_lab(lab: Nodes) -> None:
    assert lab.run(0, ["ip", "route", "show", "default"]).stdout == ""
    assert json.loads(lab.run(0, ["ip", "-j", "link"]).stdout)[0]["ifname"] == "lo"


def test_the_end_of_a_command_is_its_own(lab: Nodes) -> None:
    assert lab.run(0, ["sh", "-c", "exit 7"]).returncode == 7
    assert lab.run(0, ["sh", "-c", "kill -9 $$"]).returncode == -9
    assert lab.run(0, ["no-such-command"]).returncode == 127


def test_a_signal_reaches_the_command_in_the_node(lab: Nodes) -> None:
    script = "trap 'echo told; exit 3' TERM; echo ready; while :; do sleep 0.1; done"
    with lab.popen(0, ["sh", "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.communicate(timeout=10)[0] == "told\n"
    assert process.returncode == 3


@pytest.mark.parametrize("megabits", [20, 100])
def test_iperf3_sees_the_rate_that_was_asked_for(lab: Nodes, need: Need, megabits: int) -> None:
    need("iperf3", "iperf3")
    lab.set_link(f"{megabits}mbit")
    seen = [_iperf3(lab)]
    while not 0.80 * megabits < seen[-1] < 1.03 * megabits and len(seen) < 4:
        seen.append(_iperf3(lab))  # a busy machine slows iperf3 itself; a wrong rate stays wrong
    lab.set_link("unlimited")
    assert 0.80 * megabits < seen[-1] < 1.03 * megabits, seen


def _iperf3(lab: Nodes) -> float:
    """Megabits per second that iperf3 receives on node 1 from node 0."""
    server = lab.popen(1, ["iperf3", "-s", "-1", "--forceflush"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    while "listening" not in server.stdout.readline():
        assert server.poll() is None
    client = lab.run(0, ["iperf3", "-c", "node1", "-t", "2", "-J"])
    server.communicate(timeout=20)
    return float(json.loads(client.stdout)["end"]["sum_received"]["bits_per_second"]) / 1e6


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(Refused, match="1 to 32 nodes"):
        Nodes(0)
    with pytest.raises(Refused, match="mbit"):
        Nodes(2, "1gbit; id")


def test_latency_is_set_or_the_missing_kernel_part_is_named(lab_possible: None) -> None:
    said = ""
    try:
        with Nodes(2, "1gbit", latency_ms=5) as nodes:
            said = nodes.run(0, ["tc", "qdisc", "show", "dev", "eth0"]).stdout
    except NodesError as error:
        said = str(error)
    assert "delay 5ms" in said or ("netem" in said and "leave latency_ms out" in said)


def test_a_missing_tool_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    with pytest.raises(NodesError, match="install iproute2"):
        Nodes(2)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_the_process_ends(lab_possible: None, end: signal.Signals) -> None:
    before = interfaces()
    program = [sys.executable, "-c", STANDING]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(program, cwd=ROOT, **pipes) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 4
        process.send_signal(end)
        process.wait(20)
    assert gone(pids)
    assert interfaces() == before


def marked(mark: str) -> list[psutil.Process]:
    """Processes that were started, however far below, with this mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def ended(mark: str) -> bool:
    """Whether every process with this mark is gone within 10 s."""
    deadline = time.monotonic() + 10
    while left := marked(mark):
        if time.monotonic() > deadline:
            pytest.fail(f"left: {left}")
        time.sleep(0.05)
    return True


def killed_at_random(
    argv: list[str], mark: str, seed: int, within_s: float, **environ: str
) -> None:
    """Run `argv` until it has started another process, then kill it within that time."""
    environment = {**os.environ, "MARK": mark, **environ}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(argv, cwd=ROOT, env=environment, **pipes) as process:
        while len(marked(mark)) < 2:  # until the hub runs
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(random.Random(seed).uniform(0, within_s))
        process.kill()
        process.wait(20)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_a_kill_at_a_random_moment_leaves_nothing(lab_possible: None, seed: int) -> None:
    """Also while the lab is being made: nothing has told us yet that it stands."""
    before, mark = interfaces(), uuid.uuid4().hex
    killed_at_random([sys.executable, "-c", STANDING], mark, seed, 1.5)
    assert ended(mark)
    assert interfaces() == before


UP = [sys.executable, "-m", "pardemo.cluster", "nodes", "up"]


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_up_killed_at_a_random_moment_leaves_nothing_or_what_down_ends(
    lab_possible: None, tmp_path: Path, seed: int
) -> None:
    before, mark = interfaces(), uuid.uuid4().hex
    killed_at_random(UP, mark, seed, 0.8, XDG_RUNTIME_DIR=str(tmp_path))
    pardemo("nodes", "down", runtime=tmp_path)
    assert ended(mark)
    assert interfaces() == before
    assert list(tmp_path.iterdir()) == []


DIES = """
import os, signal, sys
from pardemo.cluster import holding
from pardemo.cluster.__main__ import main
name = sys.argv.pop()
where = holding.Held if name == "stand" else holding
setattr(where, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
main()
"""


def test_up_killed_before_and_after_it_left_word_leaves_no_lab_that_nobody_knows(
    lab_possible: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    for moment in ("save", "stand"):
        mark = uuid.uuid4().hex
        done = subprocess.run(
            [sys.executable, "-c", DIES, "nodes", "up", moment], cwd=ROOT,
            env={**os.environ, "MARK": mark},
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL
        assert ended(mark)
        assert holding.load() is None


def test_a_lab_that_has_ended_says_so(lab_possible: None) -> None:
    nodes = Nodes(1)
    os.kill(nodes.held.hub_pid, signal.SIGKILL)
    assert gone([nodes.held.holder_pids[0]])
    with pytest.raises(NodesError, match="has ended"):
        nodes.run(0, ["true"])
    nodes.close()


def pardemo(*arguments: str, runtime: Path) -> subprocess.CompletedProcess[str]:
    script = (
        "import argparse; from pardemo.cluster.cli import add_parsers; "
        "top = argparse.ArgumentParser(); add_parsers(top.add_subparsers()); "
        "a = top.parse_args(); raise SystemExit(a.run(a))"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "XDG_RUNTIME_DIR": str(runtime)}, timeout=60,
    )  # fmt: skip


def test_nodes_stand_between_commands_and_are_taken_down(
    lab_possible: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    up = pardemo("nodes", "up", "--count", "3", "--rate", "1gbit", runtime=tmp_path)
    assert "3 nodes at 10.77.0.1, 10.77.0.2, 10.77.0.3, link 1,000 Mbit/s" in up.stdout, up.stderr
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # the other commands run in this process
    try:
        assert cli.main(["nodes", "up"]) == 2
        assert "stand already" in capsys.readouterr().err
        with monkeypatch.context() as before:  # another `up` that looked a moment too early
            before.setattr(holding, "load", lambda: None)
            assert cli.main(["nodes", "up", "--count", "1"]) == 2
        assert "nodes stand already" in capsys.readouterr().err
        inside = pardemo("nodes", "run", "2", "--", "hostname", runtime=tmp_path)
        assert inside.stdout.strip() == "node2"
        assert cli.main(["nodes", "status"]) == 0
        assert "node1: sent 0.000 MB" in capsys.readouterr().out
    finally:
        cli.main(["nodes", "down"])
    assert capsys.readouterr().out.strip() == "3 nodes ended"
    assert list(tmp_path.iterdir()) == []
    assert cli.main(["nodes", "down"]) == 0
    assert capsys.readouterr().out.strip() == "no nodes stand"
