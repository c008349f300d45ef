"""A torchrun agent under test: what it prints, its workers, its end."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pardemo.cluster import torchrun
from pardemo.cluster.train import Job, run

ROOT = Path(__file__).parents[2]
PROGRAM = ["-m", "pardemo.cluster", "run", "--steps", "40", "--pause-s", "0.05"]


def undisturbed_losses(folder: Path) -> list[float]:
    """The losses of PROGRAM in one process that nothing happens to: this one."""
    return run(Job(str(folder), strategy="single", steps=40))["losses"]


class Agent:
    """A torchrun agent of `nprocs` workers in `folder`; ended, with its workers, by `end`."""

    def __init__(
        self, folder: Path, environment: dict[str, str] | None = None, nprocs: int = 2,
        program: list[str] | None = None, **how: Any,
    ) -> None:  # fmt: skip
        words = [*(program or PROGRAM), "--folder", str(folder)]
        node = how.get("node_rank", 0)
        argv = torchrun.command(words, nprocs, folder / f"logs{node}", **how)
        self.text = ""
        self.process = subprocess.Popen(
            argv, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, **(torchrun.ENVIRONMENT if environment is None else environment)},
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.text += line

    def until(self, words: str, seconds: float = 120.0) -> None:
        """Wait until it has printed `words`."""
        deadline = time.monotonic() + seconds
        while words not in self.text:
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"torchrun did not print {words!r}: {self.text[-3000:]}")
            time.sleep(0.01)

    def workers(self) -> list[int]:
        """The process ids of its workers."""
        found: list[int] = []
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            found += [int(pid) for pid in (task / "children").read_text().split()]
        return found

    def end(self, seconds: float = 120.0) -> tuple[int, str]:
        """Its exit code and output, once it has ended; killed after `seconds`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self.process.kill()
        self.process.wait()
        self._reader.join(10)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return self.process.returncode, self.text


def record(folder: Path) -> dict[str, Any]:
    """The one record of a finished training."""
    (path,) = folder.glob("record-*.json")
    return json.loads(path.read_text())


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    """Whether all of these processes have ended within `seconds`."""
    deadline = time.monotonic() + seconds
    while any(_runs(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"
