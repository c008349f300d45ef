"""What every test shares: quiet numerics, no display, and warm groups of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import matplotlib
import pytest
import torch

if TYPE_CHECKING:
    from pardemo.launch import Ranks

matplotlib.use("Agg")
torch.set_num_threads(1)  # ranks share the cores with this process


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
