"""The counted bytes beside a witness that shares no code: the network interface's own counters."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("wire_witness.py")


def namespace() -> list[str]:
    """The command that runs another in a network namespace of its own; skips, loudly, without."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        pytest.skip("no witness: unshare (util-linux) and ip (iproute2) are needed")
    for flags in (["-n"], ["-U", "-r", "-n"]):
        command = ["unshare", *flags]
        if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    pytest.skip("no witness: this user may not make a network namespace")


@pytest.fixture(scope="module")
def witnessed():
    done = subprocess.run(
        [*namespace(), sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["name"]: row for row in rows}


@pytest.mark.parametrize(
    "name", ["ddp", "fsdp", "pipeline", "exchange", "gather", "broadcast", "reduce"]
)
def test_the_loopbacks_own_counters_agree_within_3_percent(witnessed, name):
    row = witnessed[name]
    assert row["counted"] > 20e6
    assert row["interface"] == pytest.approx(row["counted"], rel=0.03)
