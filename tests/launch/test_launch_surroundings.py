"""A rank sees the kernel's surroundings as they are now: environment, directory, path, modules."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pardemo.launch import Ranks, launch


def test_environment_directory_and_import_path_are_those_of_the_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(dist.get_rank, nprocs=1)  # the fork server runs before anything below changes
    monkeypatch.setenv("PARDEMO_TEST_VARIABLE", "now")
    monkeypatch.delenv("HOME")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "lib")])

    def look() -> Any:
        return os.environ.get("PARDEMO_TEST_VARIABLE"), "HOME" in os.environ, os.getcwd(), sys.path

    seen = launch(look, nprocs=2, env={"PARDEMO_TEST_VARIABLE": "given"})
    assert seen[0][:3] == seen[1][:3] == ("given", False, str(tmp_path))
    assert launch(look, nprocs=1)[0][0] == "now"
    assert str(tmp_path / "lib") in seen[0][3]


def test_a_module_edited_on_disk_is_the_new_one_in_the_next_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    module = tmp_path / "edited_by_the_learner.py"

    def answer() -> int:
        import edited_by_the_learner

        return int(edited_by_the_learner.VALUE)

    module.write_text("VALUE = 1\n")
    assert launch(answer, nprocs=1)[0] == 1
    module.write_text("VALUE = 22\n")
    assert launch(answer, nprocs=1)[0] == 22


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def test_ranks_are_seeded_differently_and_the_same_each_time() -> None:
    first, second = launch(draws, nprocs=2), launch(draws, nprocs=2)
    assert list(first) == list(second)
    assert all(a != b for a, b in zip(first[0], first[1], strict=True))
    other = launch(draws, nprocs=2, seed=1)
    assert other[0] == first[1]  # rank 0 with seed 1 draws what rank 1 drew with seed 0
    assert list(launch(draws, nprocs=2, seed=None)) != list(launch(draws, nprocs=2, seed=None))


@pytest.mark.parametrize("start", ["forkserver", "spawn"])
def test_a_rank_finds_what_a_torchrun_script_finds(start: str) -> None:
    def look() -> dict[str, Any]:
        total = torch.ones(1)
        dist.all_reduce(total)  # moves 4 bytes
        return {
            "env": {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")},
            "rank": dist.get_rank(),
            "threads": torch.get_num_threads(),
            "backend": dist.get_backend(),
            "sum": total.item(),
            "main": __import__("__main__").__name__,
        }

    for rank, seen in enumerate(launch(look, nprocs=2, threads=2, start=start)):
        assert seen["env"] == {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        assert (seen["rank"], seen["threads"], seen["sum"]) == (rank, 2, 2.0)
        assert (seen["backend"], seen["main"]) == ("gloo", "__main__")


def test_a_function_that_makes_its_own_process_group_can_have_none_made() -> None:
    def torchrun_script() -> int:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        dist.destroy_process_group()
        return rank

    assert list(launch(torchrun_script, nprocs=2, backend="none")) == [0, 1]


def test_debug_compares_the_calls_of_all_ranks() -> None:
    def differ() -> None:
        dist.all_reduce(torch.ones(2 + dist.get_rank()))  # does not fit, on purpose

    with pytest.raises(Exception, match="Detected mismatch between collectives"):
        launch(differ, nprocs=2, debug=True)


def test_variables_are_pushed_to_and_pulled_from_every_rank(ranks2: Ranks) -> None:
    ranks2.push(factor=torch.tensor(3.0), name="x")
    assert [t.item() for t in ranks2.pull("factor")] == [3.0, 3.0]
    assert ranks2.pull("name") == ["x", "x"]


def test_more_ranks_than_cores_and_a_single_one_work() -> None:
    def total() -> float:
        value = torch.ones(1)
        dist.all_reduce(value)  # moves 4 bytes
        return value.item()

    assert list(launch(total, nprocs=1)) == [1.0]
    assert list(launch(total, nprocs=12)) == [12.0] * 12


def test_bad_options_are_refused_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="nprocs must be at least 1, not 0"):
        launch(dist.get_rank, nprocs=0)
    with pytest.raises(ValueError, match="'forkserver' or 'spawn', not 'fork'"):
        launch(dist.get_rank, start="fork")


def test_a_launch_on_a_rank_is_refused(ranks2: Ranks) -> None:
    def nested() -> str:
        try:
            launch(dist.get_rank, nprocs=2)
        except RuntimeError as error:
            return str(error)
        return ""

    assert "already runs on a rank" in ranks2(nested)[0]


def test_ranks_are_started_again_and_say_so_after_a_failure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise ValueError("planted")

    with Ranks(2) as ranks:
        ranks.push(kept=1)
        with pytest.raises(Exception, match="planted"):
            ranks(fail)
        assert [row["alive"] for row in ranks.status()] == [False, False]
        assert list(ranks(lambda: "kept" in globals())) == [False, False]
        assert "2 new ranks; the state of the old ones is gone" in capsys.readouterr().out
        rows = ranks.status()
        assert [row["rank"] for row in rows if row["alive"] and row["memory_bytes"] > 0] == [0, 1]
