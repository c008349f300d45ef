"""What the cluster tests share: a node lab, or a loud reason why there is none here."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
from collections.abc import Callable, Iterator

import pytest

from pardemo.cluster import Nodes, reasons_against
from tests.cluster.slurm import Slurm


@pytest.fixture(scope="session")
def lab_possible() -> None:
    """Skip, saying why and what to install, where this machine cannot have nodes."""
    if against := reasons_against():
        pytest.skip(f"no node lab: {against[0]}")


@pytest.fixture(scope="module")
def lab(lab_possible: None) -> Iterator[Nodes]:
    """Two nodes on an unlimited link, shared by the tests of a module."""
    with Nodes(2) as nodes:
        yield nodes


@pytest.fixture(scope="session")
def need() -> Callable[[str, str], str]:
    """A function that finds a program, or skips loudly and says which Debian package has it."""

    def path_of(tool: str, package: str) -> str:
        found = shutil.which(tool) or shutil.which(tool, path="/usr/sbin:/sbin")
        if found is None:
            pytest.skip(f"{tool} is not installed: apt-get install {package}")
        return found

    return path_of


@pytest.fixture(scope="module")
def slurm(
    need: Callable[[str, str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Slurm]:
    for tool in ("sbatch", "slurmctld", "slurmd", "munged"):
        need(tool, "slurm-wlm munge")
    name = socket.gethostname()
    try:
        socket.gethostbyname(name)
    except OSError as error:
        pytest.skip(
            f"Slurm needs an address for this host's name: add {name} to /etc/hosts ({error})"
        )
    os.environ["USER"] = pwd.getpwuid(os.geteuid()).pw_name
    running = Slurm(tmp_path_factory.mktemp("slurm"))
    yield running
    running.stop()
