"""The doctor is shown each illness in the lab, names it, and gives the remedy."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pardemo import cli
from pardemo.cluster import Nodes, desk, doctor, meeting, reach
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
    said = "FAIL  a connection from here to node1:29400 (10.77.0.2) is silent, packets are dropped"
    assert f"{said}, while node1 connects to this node: one direction is closed" in reports[0][1]
    assert "FAIL  node0:29400 cannot connect to this node: port 29400 is silent" in reports[1][1]
    for _, text in reports:
        assert "-> on node1 let node0 in on every TCP port: iptables -I INPUT -s 10.77.0.1" in text
        assert text.count("FAIL") == 1
    ((code, text),) = examine(lab, "--timeout-s", "2", alone=0)
    assert code == 1
    assert "FAIL  node1:29400 (10.77.0.2) refuses: nobody listens there for 2 s" in text
    assert "-> run the same command there at the same time" in text


@pytest.fixture
def filtered(lab: Nodes, need: Callable[[str, str], str]) -> Iterator[Callable[[int, str], None]]:
    """A firewall on a node: `words` are hook, match and verdict, for the first packet only."""
    nft = need("nft", "nftables")

    def drop(node: int, words: str) -> None:
        hook, rule = words.split(" ", 1)
        for line in (
            "add table ip planted",
            f"add chain ip planted {hook} {{ type filter hook {hook} priority 0; }}",
            f"add rule ip planted {hook} tcp flags & (syn|ack) == syn {rule}",
        ):
            done = lab.run(node, [nft, line])
            assert done.returncode == 0, done.stderr

    yield drop
    for node in range(2):
        lab.run(node, [nft, "delete table ip planted"])


HIGH = "tcp dport 32768-60999 drop"  # what the kernel gives to those who ask for any port


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (0, f"input {HIGH}"), pytest.param(1, f"input {HIGH}", marks=pytest.mark.soak),
        pytest.param(1, f"output {HIGH}", marks=pytest.mark.soak),
    ],
)  # fmt: skip
def test_a_firewall_that_lets_only_known_ports_in_is_found_from_both_ends(
    lab: Nodes, filtered: Callable[[int, str], None], node: int, words: str
) -> None:
    filtered(node, words)
    closed = node if words.startswith("input") else 1 - node
    reports = examine(lab, "--timeout-s", "6")
    dials, listens = reports[1 - closed], reports[closed]
    assert (dials[0], listens[0]) == (1, 1)
    assert f"FAIL  node{closed}:29400 answers, but a connection from here to another of" in dials[1]
    assert "is silent, packets are dropped: gloo and nccl use any port" in dials[1]
    assert f"FAIL  node{1 - closed}:29400 cannot connect to this node: port 29400 ans" in listens[1]
    for _, text in reports:
        assert f"-> on node{closed} let node{1 - closed} in on every TCP port: iptables" in text
        assert text.count("FAIL") == 1
        assert "all-reduce" not in text


@pytest.mark.parametrize("chains", [["input"], ["input", "output"]])
@pytest.mark.soak
def test_a_firewall_that_rejects_is_found(
    lab: Nodes, filtered: Callable[[int, str], None], chains: list[str]
) -> None:
    for chain in chains:
        filtered(1, f"{chain} tcp dport 29400 reject with tcp reset")
    (_, dials), (_, listens) = examine(lab, "--timeout-s", "4")
    if len(chains) == 2:  # neither can know that the other is there
        assert "FAIL  node1:29400 (10.77.0.2) refuses: nobody listens there for 4 s" in dials
        assert "FAIL  node0:29400 (10.77.0.1) refuses: nobody listens there for 4 s" in listens
        return
    assert "FAIL  a connection from here to node1:29400 (10.77.0.2) refuses, while node1" in dials
    assert "FAIL  node0:29400 cannot connect to this node: port 29400 refuses" in listens


def test_a_name_that_leads_to_another_node_is_found(lab: Nodes, hosts: None) -> None:
    lab.run(0, ["sh", "-c", "printf '10.77.0.2 node0\\n10.77.0.1 node1\\n' > /etc/hosts"])
    (_, one), (_, two) = examine(lab, "--timeout-s", "4")  # each finds itself by address
    assert "FAIL  node0:29400 is 10.77.0.2 here, and there node1:29400 answers" in one
    assert "FAIL  node0:29400 is 10.77.0.1 here, and there node1:29400 answers" in two


def nodes_at(*addresses: str | None, port: int = 29400) -> list[meeting.Node]:
    return [meeting.Node(f"n{n}", port, address) for n, address in enumerate(addresses)]


def test_names_of_the_own_node_and_of_others_are_looked_at_first() -> None:
    texts = [f.text for f in reach._names(nodes_at("10.0.0.1", None, "10.0.0.1", "10.0.0.2"))]
    assert texts == ["n1 does not resolve here", "n0:29400 and n2:29400 are both 10.0.0.1 here"]
    (finding,) = reach._own(nodes_at("10.77.77.77", "10.0.0.2"), 0)
    assert "n0 resolves to 10.77.77.77 here, which is no address of this machine" in finding.text
    assert reach.parse(f"{'a' * 70}.example:29400").address is None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_doctors_with_other_lists_of_nodes_say_so() -> None:
    nodes = [*nodes_at("127.0.0.1", port=free_port()), *nodes_at("127.0.0.1", port=free_port())]
    names = [str(node) for node in nodes]
    other = desk.Desk("127.0.0.1", nodes[1].port, 1, [*names, "n2:29400"])
    with other.open(), desk.Desk("127.0.0.1", nodes[0].port, 0, names).open() as mine:
        (finding,) = meeting.meet(nodes[1], 1, nodes, mine, 5)
    assert finding.text == f"{nodes[1]} was given other nodes: {' '.join(names)} n2:29400"
    assert other.asked == {0}
    assert other.told == set()


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"[]", b"[" * 60_000, b'{"facts": 1}',
        json.dumps(
            {
                "facts": {"host": "\x1b[2J", "python": "3", "torch": "2", "nccl": "", "gpus": 0},
                "clock": 0, "index": 1, "nodes": [], "port": 1, "verdict": None, "pairs": True,
            }
        ).encode(),
    ],
)  # fmt: skip
def test_whatever_else_answers_is_no_doctor(said: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        nodes = nodes_at("127.0.0.1", "127.0.0.1", port=server.getsockname()[1])

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(64)
                connection.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        mine = desk.Desk("127.0.0.1", 0, 0, [str(node) for node in nodes])
        (finding,) = meeting.meet(nodes[1], 1, nodes, mine, 1.0)
        thread.join()
    assert finding.text.endswith("answers, but it is no doctor")


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
        nodes = nodes_at("127.0.0.1", "127.0.0.1", port=silent.getsockname()[1])
        here = desk.Desk("127.0.0.1", 0, 0, list(map(str, nodes)))
        (finding,) = meeting.meet(nodes[1], 1, nodes, here, 1.0)
    assert "takes connections and says nothing: it is no doctor" in finding.text


def test_an_all_reduce_that_finds_its_port_taken_says_which() -> None:
    node = meeting.Node("n0", 29400, "10.0.0.1")
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


@pytest.mark.parametrize("bad", ["1e300", "0", "-1"])
def test_the_doctor_waits_for_a_time_that_ends(bad: str) -> None:
    nodes = ["127.0.0.1:29400", "127.0.0.2:29400"]
    with contextlib.redirect_stderr(io.StringIO()) as told:
        assert cli.main(["doctor", "--timeout-s", bad, "--nodes", *nodes]) == 2
    assert told.getvalue().startswith("pardemo: --timeout-s must be 0 to 86,400 seconds, not ")
