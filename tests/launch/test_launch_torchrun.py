"""The same script, with and without torchrun."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from pardemo import Ranks, launch, report

def train(steps):
    weight = torch.full((2,), float(dist.get_rank()))
    for step in range(steps):
        dist.all_reduce(weight)
        report(step=step, loss=weight.sum())
    return dist.get_rank(), weight

if __name__ == "__main__":
    first = launch(train, 2, nprocs=2)
    with Ranks(2) as ranks:
        second = ranks(train, steps=1)
    ranks = [value[0] for value in first]
    said = [ranks, first[0][1].tolist(), second[1][1].tolist(), first.nprocs]
    sys.stdout.write(f"{said}\\n")  # in one piece: two processes write to one pipe
"""


@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_one_script_gives_the_same_values_under_both(tmp_path: Path, launcher: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(script)]
    if launcher == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command = [sys.executable, *torchrun, "--nproc-per-node", "2", str(script)]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2]
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith("[")]
    said = "[[0, 1], [2.0, 2.0], [1.0, 1.0], 2]"
    assert lines == [said] * (2 if launcher == "torchrun" else 1), ran.stderr
