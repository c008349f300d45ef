"""The doctor is shown each illness in the lab, names it, and gives the remedy."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pardemo.cluster import Nodes, doctor, reach
from pardemo.parameters import Refused

ROOT = Path(__file__).parents[2]
DOCTOR = [sys.executable, "-m", "pardemo.cluster", "doctor"]
BOTH = ["--nodes", "node0:29400", "node1:29400"]


def examine(
    lab: Nodes, *arguments: str, environment: list[dict[str, str]] | None = None,
    alone: int | None = None, nodes: list[str] = BOTH,
) -> list[tuple[int, str]]:  # fmt: skip
    """Exit code and report of the doctor on both nodes at once, or on node `alone`."""
    argv = [*DOCTOR, *nodes, *arguments]
    which = range(len(lab)) if alone is None else [alone]
    given = environment or [{}, {}]
    started = [
        lab.popen(n, argv, {"PYTHONPATH": str(ROOT), **given[n]}, text=True, stdout=subprocess.PIPE)
        for n in which
    ]
    return [(p.wait(), out) for p in started for out in [p.communicate(timeout=120)[0]]]


@pytest.fixture
def hosts(lab: Nodes) -> Iterator[None]:
    """The hosts files as they were, afterwards."""
    before = [lab.run(node, ["cat", "/etc/hosts"]).stdout for node in range(2)]
    yield
    for node, text in enumerate(before):
        lab.run(node, ["sh", "-c", f"printf '{text}' > /etc/hosts"])


def test_healthy_nodes_all_reduce_and_may_train(lab: Nodes) -> None:
    reports = examine(lab)
    for (code, text), other in zip(reports, ("node1", "node0"), strict=True):
        assert code == 0, text
        assert f"ok    all-reduce with {other}:29400: 4.2 MB in" in text
        assert f"{other} has the same versions; clocks agree" in text
        assert "these nodes can train: 0 failures" in text


def test_a_name_that_resolves_to_loopback_is_found(lab: Nodes, hosts: None) -> None:
    wrong = "127.0.1.1 node0\\n10.77.0.2 node1\\n"
    lab.run(0, ["sh", "-c", f"printf '{wrong}' > /etc/hosts"])
    ((code, text),) = examine(lab, "--this", "0", alone=0)
    assert code == 1
    assert "FAIL  node0 resolves to 127.0.1.1 here: other nodes cannot reach that" in text
    assert "-> correct /etc/hosts on this node" in text


def test_gloo_on_loopback_is_found_without_waiting_for_an_all_reduce(lab: Nodes) -> None:
    wrong = {"GLOO_SOCKET_IFNAME": "lo"}
    reports = examine(lab, environment=[wrong, wrong])
    for (code, text), address in zip(reports, lab.addresses, strict=True):
        assert code == 1
        said = f"GLOO_SOCKET_IFNAME=lo has the address 127.0.0.1, and the nodes meet at {address}"
        assert f"FAIL  {said}: no other node can connect to it" in text
        assert "-> set it to eth0" in text
        assert "all-reduce" not in text


@pytest.mark.soak
def test_gloo_on_the_wrong_interface_is_found_by_the_all_reduce(lab: Nodes) -> None:
    for node in range(2):
        for line in (
            "link add far0 type veth peer name far1", f"addr add 10.{98 + node}.0.1/24 dev far0",
            "link set far1 up", "link set far0 up",
        ):  # fmt: skip
            assert lab.run(node, ["ip", *line.split()]).returncode == 0
    wrong = {"GLOO_SOCKET_IFNAME": "far0"}
    reports = examine(lab, "--timeout-s", "8", environment=[wrong, wrong])
    for node in range(2):
        lab.run(node, ["ip", "link", "del", "far0"])
    assert all("WARN  GLOO_SOCKET_IFNAME=far0 has the address 10." in t for _, t in reports)
    assert any("FAIL  all-reduce with" in text for _, text in reports)
    assert "-> set GLOO_SOCKET_IFNAME (one of eth0, far0)" in "".join(t for _, t in reports)
    assert 1 in [code for code, _ in reports]


def test_an_interface_that_is_not_there_is_found(lab: Nodes) -> None:
    environment = [{"GLOO_SOCKET_IFNAME": "ib0"}] * 2
    ((code, text),) = examine(lab, alone=0, nodes=[], environment=environment)
    assert code == 1
    assert "FAIL  GLOO_SOCKET_IFNAME=ib0, but no interface of that name is up" in text
    assert "-> there are: lo, eth0" in text


def test_a_port_in_use_is_found_with_its_holder(lab: Nodes) -> None:
    listen = (
        "import socket, time; s = socket.create_server(('', 29400)); print('on', flush=True); "
        "time.sleep(99)"
    )
    held = lab.popen(1, [sys.executable, "-c", listen], stdout=subprocess.PIPE, text=True)
    assert held.stdout is not None
    assert held.stdout.readline() == "on\n"
    ((code, text),) = examine(lab, alone=1)
    held.kill()
    held.wait()
    assert code == 1
    assert "FAIL  port 29400 is in use by process" in text
    assert "(python" in text


def test_a_firewall_that_drops_is_told_from_a_node_that_is_not_ready(lab: Nodes) -> None:
    rule = ["ipproto", "tcp", "sport", "29400", "blackhole"]
    assert lab.run(1, ["ip", "rule", "add", *rule]).returncode == 0
    reports = examine(lab, "--timeout-s", "6", "--no-pairs")
    lab.run(1, ["ip", "rule", "del", *rule])
    assert "FAIL  node1:29400 (10.77.0.2) does not answer: packets are dropped" in reports[0][1]
    assert "-> a firewall drops them" in reports[0][1]
    ((code, text),) = examine(lab, "--timeout-s", "2", alone=0)
    assert code == 1
    assert "FAIL  node1:29400 (10.77.0.2) refuses: nobody listens there for 2 s" in text
    assert "-> run the same command there at the same time" in text


def test_a_pulled_cable_is_found(lab: Nodes) -> None:
    lab.plug(1, False)
    ((code, text),) = examine(lab, "--timeout-s", "5", alone=0)
    lab.plug(1, True)
    assert code == 1
    assert "there is no way to node1:29400" in text or "does not answer" in text


def test_an_address_of_another_machine_is_refused_with_the_own_ones(lab: Nodes) -> None:
    wrong = ["--nodes", "10.77.0.9:29400", "node1:29400"]
    ((code, text),) = examine(lab, alone=0, nodes=wrong)
    assert code == 1
    assert "none of 10.77.0.9:29400, node1:29400 is an address of this machine" in text
    assert "10.77.0.1" in text


def test_small_memory_and_few_files_are_found(lab_possible: None) -> None:
    with Nodes(1, shm_bytes=32 << 20) as small:
        script = 'ulimit -n 256; exec "$0" "$@"'
        done = small.run(0, ["sh", "-c", script, *DOCTOR], env={"PYTHONPATH": str(ROOT)})
    assert "WARN  /dev/shm has 34 MB" in done.stdout
    assert "--shm-size" in done.stdout
    assert "WARN  a process may open 256 files" in done.stdout
    assert done.returncode == 0


def test_a_limit_on_memory_is_found(lab: Nodes) -> None:
    script = 'ulimit -v 20000000; exec "$0" "$@"'
    done = lab.run(0, ["sh", "-c", script, *DOCTOR], env={"PYTHONPATH": str(ROOT)}, timeout=120)
    assert "WARN  a process may map 20.5 GB" in done.stdout, done.stderr
    assert "-> ulimit -v unlimited" in done.stdout


def test_the_least_limit_of_a_cgroup_and_those_above_counts(tmp_path: Path) -> None:
    own = Path("/proc/self/cgroup").read_text().strip().splitlines()[-1].split(":")[2].strip("/")
    folder = tmp_path / own
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text("1000000000\n")
    assert doctor._cgroup_limits(tmp_path) == [1_000_000_000]
    (folder / "memory.max").write_text("max\n")
    assert doctor._cgroup_limits(tmp_path) == []


OTHER = """
import sys, time
import torch
now, torch.__version__ = time.time, "2.12.0"
time.time = lambda: now() - 90
from pardemo.cluster.__main__ import main
sys.argv[0] = "pardemo"
raise SystemExit(main())
"""


def test_another_version_and_another_clock_on_a_node_are_found(lab: Nodes) -> None:
    words = ["doctor", *BOTH, "--no-pairs"]
    environment = {"PYTHONPATH": str(ROOT)}
    pipes = {"text": True, "stdout": subprocess.PIPE}
    argvs = ([*DOCTOR[:-1], *words], [sys.executable, "-c", OTHER, *words])
    started = [lab.popen(n, argv, environment, **pipes) for n, argv in enumerate(argvs)]
    text, _ = (process.communicate(timeout=150)[0] for process in started)
    assert "FAIL  torch is " in text
    assert " and 2.12.0 on node1" in text
    assert "WARN  the clock of node1 is -" in text
    assert "-> logs will not line up" in text


def test_whoever_listens_and_says_nothing_is_no_firewall() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        node = reach.Node("n1", silent.getsockname()[1], "127.0.0.1")
        (finding,) = reach.meet(node, 1.0)
    assert "takes connections and says nothing: it is no doctor" in finding.text


def test_an_all_reduce_that_finds_its_port_taken_says_which() -> None:
    node = reach.Node("n0", 29400, "10.0.0.1")
    assert "port 29401 is in use on n0" in reach._advice("DistNetworkError EADDRINUSE ...", node)
    assert "set GLOO_SOCKET_IFNAME" in reach._advice("connectFullMesh failed", node)


@pytest.mark.parametrize(
    ("variable", "value", "names"),
    [
        ("GLOO_SOCKET_IFNAME", "eth", []), ("GLOO_SOCKET_IFNAME", "ib0,eth0", ["eth0"]),
        ("NCCL_SOCKET_IFNAME", "eth", ["eth0", "eth1"]), ("NCCL_SOCKET_IFNAME", "=eth", []),
        ("NCCL_SOCKET_IFNAME", "=eth1", ["eth1"]),
    ],
)  # fmt: skip
def test_gloo_wants_whole_names_and_nccl_beginnings(
    variable: str, value: str, names: list[str]
) -> None:
    there: dict[str, list[str]] = {"lo": [], "eth0": [], "eth1": []}
    assert doctor.meant(variable, value, there) == names


FACTS = {"host": "n1", "python": "3.11.7", "torch": "2.13.0", "nccl": "", "gpus": 0}


@pytest.mark.parametrize(
    ("change", "clock_s", "level", "words"),
    [
        ({"torch": "2.12.0"}, 0.0, "FAIL", "torch is 2.13.0 here and 2.12.0 on n1"),
        ({"nccl": "2.27.3"}, 0.0, "FAIL", "nccl is  here and 2.27.3 on n1"),
        ({"python": "3.12.1"}, 0.0, "WARN", "Python is 3.11.7 here and 3.12.1"),
        ({"gpus": 8}, 0.0, "WARN", "0 GPUs here and 8 on n1"),
        ({}, -90.0, "WARN", "clock of n1 is -90.0 s away"),
        ({"python": "3.11.9"}, 0.1, "ok", "same versions"),
    ],
)
def test_what_differs_between_nodes_is_said(
    change: dict[str, object], clock_s: float, level: str, words: str
) -> None:
    (finding,) = doctor.compare(FACTS, {**FACTS, **change}, clock_s)
    assert finding.level == level
    assert words in finding.text
    assert (level == "ok") == (finding.remedy == "")


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_every_pair_meets_once_and_no_node_is_in_two_pairs_at_a_time(count: int) -> None:
    made = reach.rounds(count)
    pairs = [pair for one in made for pair in one]
    assert sorted(pairs) == [(a, b) for a in range(count) for b in range(a + 1, count)]
    for one in made:
        assert len({node for pair in one for node in pair}) == 2 * len(one)


@pytest.mark.parametrize("bad", ["node0", "node0:", ":29400", "node0:80", "node0:x", "node0:99999"])
def test_a_node_is_a_host_and_a_port(bad: str) -> None:
    with pytest.raises(Refused, match="host:port"):
        reach.parse(bad)
