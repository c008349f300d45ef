"""Whatever ends a kernel ends its ranks, and what they started, within two seconds."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from launch_kernels import SETUP, Kernel, a_kernel, alive, kill_hard

from pardemo.launch import spawned

WITH_WORKERS = """
from torch.utils.data import DataLoader
class Slow(torch.utils.data.Dataset):
    def __len__(self): return 1000
    def __getitem__(self, i):
        time.sleep(0.05)
        return torch.ones(2)
"""

BLOCKED = {
    "mutual recv": "dist.recv(torch.ones(2), 1 - rank())",
    "data loader": """loader = DataLoader(Slow(), num_workers=2, persistent_workers=True)
    batches = iter(loader)
    next(batches)
    print('now', flush=True)
    time.sleep(60)""",
}


def blocked_kernel(kernel: Kernel, how: str, start: str = "forkserver") -> list[psutil.Process]:
    """Two ranks blocked in the kernel, and the whole family of its processes."""
    assert kernel.run(SETUP + WITH_WORKERS).status == "ok"
    body = "" if how == "data loader" else "    print('now', rank(), flush=True)\n"
    cell = f"def block():\n{body}    {BLOCKED[how]}\nlaunch(block, nprocs=2, start={start!r})"
    kernel.send(cell)
    kernel.wait_for_output("now", timeout=90)
    time.sleep(0.3)
    return kernel.family()


@pytest.mark.parametrize("how", BLOCKED)
def test_nothing_outlives_a_killed_kernel_by_two_seconds(how: str) -> None:
    with a_kernel() as kernel:
        family = blocked_kernel(kernel, how)
        assert len(family) >= (8 if how == "data loader" else 4)  # kernel, fork server, ranks
        assert kill_hard(kernel) == []


def test_nothing_outlives_a_killed_kernel_when_ranks_were_spawned() -> None:
    with a_kernel() as kernel:
        blocked_kernel(kernel, "data loader", start="spawn")
        assert kill_hard(kernel) == []


def test_ranks_that_are_released_already_can_be_stopped() -> None:
    """A stop that comes while another thread has seen them end: in 1 of 20 Ctrl-C it raised
    "process object is closed" over the KeyboardInterrupt."""
    started = spawned.spawn(1)
    started.stop()
    started.release()
    started.stop()
    for end in started.ends:
        end.close()


def test_a_child_that_the_kernel_forked_does_not_keep_the_ranks_alive() -> None:
    with a_kernel() as kernel:
        assert kernel.run(SETUP).status == "ok"
        cell = "held = Ranks(2).__enter__()\nchild = os.fork()\nif child == 0: time.sleep(600)"
        assert kernel.run(cell).status == "ok"
        child = psutil.Process(int(kernel.run("print(child)").out))
        try:
            left = [p for p in kill_hard(kernel) if p.pid != child.pid]
            assert left == []
        finally:
            child.kill()


def test_a_restart_leaves_no_rank() -> None:
    with a_kernel() as kernel:
        family = blocked_kernel(kernel, "data loader")[1:]
        kernel.manager.restart_kernel(now=True)
        deadline = time.monotonic() + 2.0
        while alive(family) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert alive(family) == []


def test_a_killed_fork_server_is_named_and_the_next_launch_works() -> None:
    with a_kernel() as kernel:
        family = blocked_kernel(kernel, "mutual recv")
        cell = kernel.last
        server = next(p for p in family if "pardemo.launch.zygote" in p.cmdline())
        ranks = server.children(recursive=True)
        os.kill(server.pid, signal.SIGKILL)
        deadline = time.monotonic() + 5.0
        while alive(ranks) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert alive(ranks) == []
        assert "the process that forks ranks was ended from outside" in kernel.reply(cell).evalue
        assert kernel.run("print(launch(reduce, nprocs=2)[0])").out == "4.0\n"


def test_a_fork_server_that_still_imports_torch_ends_with_its_kernel(tmp_path: Path) -> None:
    """Its import takes for ever here, as it may seem to on a busy machine."""
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(600)\n")
    script = """
    import os, signal, sys, time
    from pardemo.launch import servers
    os.environ["PYTHONPATH"] = sys.argv[1]
    print(servers.fork_server().process.pid, flush=True)
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    with contextlib.suppress(psutil.NoSuchProcess):
        server = psutil.Process(int(ran.stdout))
        psutil.wait_procs([server], timeout=2.0)
        assert alive([server]) == []
