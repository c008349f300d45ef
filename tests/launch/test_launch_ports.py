"""Loopback only, no fixed port, no crosstalk, and it works where there is no network."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from launch_kernels import SETUP, a_kernel

from pardemo.launch import Ranks, launch


def listening(process: psutil.Process) -> set[str]:
    found = process.net_connections(kind="inet")
    return {c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN}


def test_every_listener_of_kernel_fork_server_and_ranks_is_on_loopback() -> None:
    with Ranks(2) as ranks:
        ranks(dist.barrier)  # moves nothing; all connections stand now
        here = psutil.Process()
        family = [here, *here.children(recursive=True)]
        assert {row["pid"] for row in ranks.status()} <= {p.pid for p in family}
        living = [p for p in family if p.status() != psutil.STATUS_ZOMBIE]
        addresses = set().union(*(listening(p) for p in living))
    assert addresses == {"127.0.0.1"}


def test_port_29500_being_taken_changes_nothing() -> None:
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind(("127.0.0.1", 29500))
            holder.listen()
        except OSError:
            pass  # somebody else holds it: just as good
        assert list(launch(dist.get_rank, nprocs=2)) == [0, 1]


def test_two_kernels_that_launch_at_the_same_moment_never_meet() -> None:
    work = """
def mine(seed):
    x = torch.full((4,), float(seed))
    dist.all_reduce(x)
    return x.sum().item()
print([launch(mine, {seed}, nprocs=2)[1] for _ in range(10)])
"""
    with a_kernel() as one, a_kernel() as two:
        assert (one.run(SETUP).status, two.run(SETUP).status) == ("ok", "ok")
        first = one.send(work.replace("{seed}", "1"))
        second = two.send(work.replace("{seed}", "100"))
        assert one.reply(first).out == f"{[8.0] * 10}\n"
        assert two.reply(second).out == f"{[800.0] * 10}\n"


def test_two_groups_of_one_kernel_live_beside_each_other() -> None:
    def total(value: float) -> float:
        x = torch.tensor([value])
        dist.all_reduce(x)  # moves 4 bytes
        return x.item()

    with Ranks(2) as two, Ranks(3) as three:
        assert (two(total, 1.0)[0], three(total, 10.0)[2]) == (2.0, 30.0)
        assert launch(total, 5.0, nprocs=2)[1] == 10.0
        assert (two(total, 1.0)[0], three(total, 10.0)[2]) == (2.0, 30.0)


@pytest.mark.parametrize("hostname", ["resolves to nothing", "has no network"])
def test_it_works_without_a_network(tmp_path: Path, hostname: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import torch.distributed as dist
            from pardemo import launch
            print(list(launch(dist.get_rank, nprocs=2)))
            """
        )
    )
    inside = "ip link set lo up"
    if hostname == "resolves to nothing":
        inside += "; hostname nobody.invalid"
    unshare = shutil.which("unshare")
    if unshare is None or shutil.which("ip") is None:
        pytest.skip("needs unshare and ip, to make a machine without a network")
    command = [unshare, "--user", "--map-root-user", "--net", "--uts", "sh", "-c"]
    if subprocess.run([*command, "ip link set lo up"], capture_output=True).returncode:
        pytest.skip("this system does not let a user make a network namespace")
    ran = subprocess.run(
        [*command, f'{inside}; exec "$0" "$1"', sys.executable, script],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert ran.stdout == "[0, 1]\n", ran.stderr
