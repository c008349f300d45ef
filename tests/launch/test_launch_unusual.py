"""Cases that are rare, and that other launchers get wrong or never end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import nbclient.exceptions
import nbformat
import psutil
import pytest
import torch
import torch.distributed as dist
from launch_kernels import SETUP, a_kernel, alive

from pardemo.launch import RankFailed, Ranks, RankTimeout, launch

ROOT = Path(__file__).parents[2]


def test_when_all_ranks_raise_each_error_is_told() -> None:
    def fail() -> None:
        raise ValueError(f"planted on rank {dist.get_rank()}")

    with pytest.raises(RankFailed) as caught:
        launch(fail, nprocs=3)
    for rank in range(3):
        assert f"raised ValueError: planted on rank {rank}" in str(caught.value)


def test_when_two_ranks_raise_different_errors_the_first_is_the_headline() -> None:
    def fail() -> None:
        if dist.get_rank() == 1:
            raise KeyError("the first")
        if dist.get_rank() == 2:
            time.sleep(0.2)
            raise ValueError("the second")
        dist.all_reduce(torch.ones(1))  # moves nothing: the others never come

    with pytest.raises(RankFailed) as caught:
        launch(fail, nprocs=3)
    assert caught.value.rank == 1
    assert str(caught.value).startswith("rank 1 of 3 raised KeyError: 'the first'")
    assert "rank 2: raised ValueError: the second" in str(caught.value)


def test_a_message_that_nobody_can_read_to_its_end_is_cut() -> None:
    def fail() -> None:
        raise ValueError("x" * 10_000_000 + " the end")

    with pytest.raises(RankFailed, match="rank 0 of 1 raised ValueError: xxx") as caught:
        launch(fail, nprocs=1)
    assert len(str(caught.value)) < 100_000
    assert "the end" in str(caught.value)
    assert "characters left out" in str(caught.value)


class _Exits:
    """Ends the program when it arrives."""

    def __reduce__(self) -> tuple[Callable[[int], NoReturn], tuple[int]]:
        return sys.exit, (9,)


def test_a_value_that_fails_on_arrival_is_named_and_the_ranks_live_on(ranks2: Ranks) -> None:
    with pytest.raises(RankFailed, match="the value of rank 0 cannot be read here: SystemExit: 9"):
        ranks2(_Exits)
    assert list(ranks2(dist.get_rank)) == [0, 1]


def test_ranks_that_wait_for_each_other_show_both_lines() -> None:
    def both_receive() -> None:
        dist.recv(torch.ones(1), 1 - dist.get_rank())  # the line that waits

    with pytest.raises(RankTimeout, match="ranks 0 and 1 waited for each other") as caught:
        launch(both_receive, nprocs=2, timeout=2)
    assert str(caught.value).count("the line that waits") == 2


def test_a_group_that_cannot_be_made_says_so_before_the_function_runs() -> None:
    with pytest.raises(RankFailed, match="before its process group was ready, rank"):
        launch(dist.get_rank, nprocs=2, backend="carrier_pigeon")
    assert list(launch(dist.get_rank, nprocs=2)) == [0, 1]


def test_a_stopped_rank_that_takes_no_arguments_ends_at_the_timeout() -> None:
    """More than its socket holds: a send without a limit would wait for ever."""
    with Ranks(2, timeout=2) as ranks:
        ranks(dist.get_rank)
        os.kill(ranks.status()[1]["pid"], signal.SIGSTOP)
        with pytest.raises(RankTimeout, match="its process is stopped") as caught:
            ranks(len, torch.ones(2_000_000))
        assert caught.value.rank == 1


def test_a_class_defined_anew_is_the_new_one_on_ranks_that_stay() -> None:
    with a_kernel() as kernel:
        assert kernel.run(SETUP).status == "ok"
        assert kernel.run("ranks = Ranks(2).__enter__()", timeout=120).status == "ok"
        for value in (1, 2):
            defined = f"class Model:\n    value = {value}\nmake = lambda: Model()"
            assert kernel.run(defined).status == "ok"
            asked = "made = ranks(make)\nprint(made[1].value, type(made[1]) is Model)"
            assert kernel.run(asked).out == f"{value} True\n"


@pytest.mark.parametrize("how", ["told to end", "shut down"])
def test_a_kernel_that_ends_by_itself_takes_its_ranks_along(how: str) -> None:
    with a_kernel() as kernel:
        assert kernel.run(SETUP).status == "ok"
        assert kernel.run("ranks = Ranks(2).__enter__()", timeout=120).status == "ok"
        family = kernel.family()
        assert len(family) == 4  # the kernel, its fork server, two ranks
        if how == "told to end":
            os.kill(kernel.pid, signal.SIGTERM)
        else:
            kernel.manager.shutdown_kernel(now=False)
        deadline = time.monotonic() + 10
        while alive(family) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert alive(family) == []


def test_a_cell_that_times_out_under_nbclient_leaves_no_rank(tmp_path: Path) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    notebook = nbformat.v4.new_notebook()
    hang = "from pardemo import launch\nimport time\nlaunch(time.sleep, 600, nprocs=2)"
    notebook.cells = [nbformat.v4.new_code_cell(hang)]
    client = nbclient.NotebookClient(notebook, timeout=12, resources={"metadata": {"path": "."}})
    with pytest.raises(nbclient.exceptions.CellTimeoutError):
        client.execute()
    after = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    deadline = time.monotonic() + 10
    while alive(after) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(after) == []


@pytest.mark.skipif(
    shutil.which("unshare") is None or os.geteuid() != 0,
    reason="needs root and unshare: it starts a process as number 1, as a container does",
)
def test_a_kernel_that_is_process_number_1_works(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os
            import torch.distributed as dist
            from pardemo import launch
            print(os.getpid(), list(launch(dist.get_rank, nprocs=2)))
            """
        )
    )
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, str(script)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert ran.stdout == "1 [0, 1]\n", ran.stderr
