"""A model that this repository has never seen, in a package of its own: what fits, and why not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pardemo import suite
from pardemo.workloads import workload
from tests.suite.test_suite_run import PROFILE

PACKAGE = '''
import torch
from torch import nn
import torch.nn.functional as F


class Twice(nn.Module):
    """One layer that runs twice, a frozen one, a buffer, and a seven wide head."""

    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Linear(12, 20), nn.Linear(20, 20)
        self.fixed = nn.Linear(20, 20).requires_grad_(False)
        self.head = nn.Linear(20, 7)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.relu(self.again(torch.relu(self.again(x))))
        return self.head(torch.relu(self.fixed(x)) * self.scale)


def make_model():
    return Twice(), F.cross_entropy, (torch.randn(12, 12), torch.arange(12) % 7)
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "elsewhere" / "my_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("PYTHONPATH", str(folder.parent))
    yield "my_package:make_model"
    sys.modules.pop("my_package", None)


def test_every_strategy_runs_it_or_says_why_not(package: str) -> None:
    assert workload(package).batch_size == 12
    table = suite.run(
        package, nprocs=2, rounds=6, seconds=1.0, check_steps=2, profile=PROFILE, anatomy=False,
        say=lambda text: None,
    )  # fmt: skip
    timed = {row.name for row in table.timed}
    assert {"ddp", "zero1", "fsdp", "data_parallel"} <= timed
    for row in table.rows:
        assert row.step is not None or row.reason, row.name
        assert "Traceback" not in row.reason
    for row in table.timed:
        if row.ledger is not None and row.ranks > 1:
            assert not row.ledger.unequal, repr(row.ledger)
    assert "no experts" in table["expert"].reason
    assert "attend" in table["context"].reason
    for row in table.scales().rows:
        assert row.states_equal, row.cells()
