"""What every test shares: quiet numerics, no display, and warm groups of ranks."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from typing import TYPE_CHECKING

import matplotlib
import pytest
import torch

if TYPE_CHECKING:
    from pardemo.launch import Ranks

matplotlib.use("Agg")
torch.set_num_threads(1)  # ranks share the cores with this process


WANTED_FILES, LEAST_FILES = 1024, 256  # open files at a time: ranks, kernels and a browser


def pytest_configure() -> None:
    """Take as many open files as the system allows, or say in one line what the tests need."""
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
