"""What every test shares: quiet numerics, no display, and warm groups of ranks.

`make test` runs in one process, and with WORKERS=2 in two, each of which takes one file after
another. A fault test counts what its own process and all below it hold, so that another one beside
it does not matter.
"""

from __future__ import annotations

import os
import resource
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import pytest
import torch

if TYPE_CHECKING:
    from pardemo.launch import Ranks

matplotlib.use("Agg")
torch.set_num_threads(1)  # ranks share the cores with this process


WANTED_FILES, LEAST_FILES = 1024, 256  # open files at a time: ranks, kernels and a browser
ALONE = "::test_it_runs_with_small_values"  # of a file, what shares nothing with its other tests
ONE_AFTER_ANOTHER = ("tests/cluster/", "tests/faults/test_cluster_rows.py")  # nodes, and Slurm's


def together(nodeid: str) -> str:
    """The name of what one process runs in a row: a file, one notebook, or all that need nodes."""
    if ALONE in nodeid:
        return nodeid
    return "nodes" if nodeid.startswith(ONE_AFTER_ANOTHER) else nodeid.split("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give whole files to the processes, in order, so that each starts its warm ranks once."""
    from xdist.scheduler import LoadScopeScheduling

    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = together
    return scheduler


def _own_temporary_folder() -> None:
    """Of one of several test processes: pardemo lets only one at a time measure in a folder."""
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        folder = Path(tempfile.gettempdir()) / f"pardemo-{os.getuid()}-{worker}"
        folder.mkdir(mode=0o700, exist_ok=True)
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)


def _hear_signals() -> None:
    """What runs in the background or under nohup ignores signals, and so does what it starts: tests
    that stop a process would wait for ever. A handler is not inherited, ignoring is."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda number, frame: None)


def pytest_configure() -> None:
    """Take as many open files as the system allows, or say in one line what the tests need."""
    _own_temporary_folder()
    _hear_signals()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
    if enough < LEAST_FILES:
        pytest.exit(
            f"the tests need {LEAST_FILES} open files at a time, and {hard} are allowed: "
            f"raise the hard limit (ulimit -Hn, as root) to {WANTED_FILES}",
            returncode=2,
        )
    if soft != resource.RLIM_INFINITY and soft < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))


def _group(size: int) -> Iterator[Ranks]:
    from pardemo.launch import Ranks

    with Ranks(size, timeout=120) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def ranks2() -> Iterator[Ranks]:
    """Two warm ranks, shared by the tests of a module."""
    yield from _group(2)


@pytest.fixture(scope="module")
def ranks4() -> Iterator[Ranks]:
    """Four warm ranks, shared by the tests of a module."""
    yield from _group(4)
