"""What goes to the ranks and what comes back: any size, any kind, or an error that names it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pardemo.launch import RankFailed, Ranks, Results, launch
from pardemo.launch.pickling import Unsendable


def test_values_of_every_kind_come_back_from_every_rank(ranks2: Ranks) -> None:
    def make() -> dict[str, Any]:
        rank = dist.get_rank()
        leaf = torch.arange(6.0).reshape(2, 3).requires_grad_()
        return {
            "rank": rank,
            "none": None,
            "grad": leaf * 2,
            "transposed": torch.arange(6).reshape(2, 3).T,
            "scalar": torch.tensor(rank),
            "empty": torch.empty(0, 3),
            "bfloat16": torch.ones(3, dtype=torch.bfloat16),
            "complex": torch.ones(2, dtype=torch.complex64).conj(),
            "bool": torch.tensor([True, False]),
            "sparse": torch.eye(3).to_sparse(),
            "numpy": np.arange(rank + 1),
            "state": torch.nn.Linear(2, 2).state_dict(),
        }

    for rank, value in enumerate(ranks2(make)):
        assert value["rank"] == rank
        assert value["none"] is None
        assert not value["grad"].requires_grad
        assert torch.equal(value["grad"], torch.arange(6.0).reshape(2, 3) * 2)
        assert torch.equal(value["transposed"], torch.arange(6).reshape(2, 3).T)
        assert value["scalar"].item() == rank
        assert value["empty"].shape == (0, 3)
        assert value["bfloat16"].dtype == torch.bfloat16
        assert value["complex"].tolist() == [1, 1]
        assert value["bool"].tolist() == [True, False]
        assert torch.equal(value["sparse"].to_dense(), torch.eye(3))
        assert value["numpy"].tolist() == list(range(rank + 1))
        assert list(value["state"]) == ["weight", "bias"]
        value["scalar"].add_(1)  # what comes back is the caller's own, and writable


@pytest.mark.parametrize("size", [60_000, 100_000, 64_000_000])
def test_values_of_any_size_come_back_and_do_not_block(ranks2: Ranks, size: int) -> None:
    values = ranks2(lambda: (bytes(size), torch.ones(size, dtype=torch.uint8)))
    assert [(len(raw), tensor.sum().item()) for raw, tensor in values] == [(size, size)] * 2


def test_arguments_arrive_whole_and_are_not_shared_between_ranks(ranks2: Ranks) -> None:
    weight = torch.ones(1000, requires_grad=True)
    model = torch.nn.Linear(3, 3)

    def change(weight: torch.Tensor, model: torch.nn.Module, extra: int = 0) -> Any:
        with torch.no_grad():
            weight += dist.get_rank() + 1
        dist.barrier()  # moves nothing: both have written now
        return weight.requires_grad, weight.sum().item(), extra, model.weight

    results = ranks2(change, weight, model, extra=3)
    assert [r[:3] for r in results] == [(True, 2000.0, 3), (True, 3000.0, 3)]
    assert torch.equal(results[0][3], model.weight)
    assert weight.sum().item() == 1000.0


def test_what_cannot_be_sent_is_named_and_the_ranks_live_on(ranks2: Ranks) -> None:
    lock = threading.Lock()
    held = {"inside": lock}
    with pytest.raises(Unsendable, match="'held', which the function uses"):
        ranks2(lambda: held)
    with pytest.raises(Unsendable, match=r"argument 0 \(a lock\)"):
        ranks2(print, lock)
    with pytest.raises(Unsendable, match="argument 'file'"):
        ranks2(print, file=lock)
    assert list(ranks2(dist.get_rank)) == [0, 1]


def test_a_dtensor_is_refused_with_the_way_out() -> None:
    def give() -> Any:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (2,))
        return distribute_tensor(torch.ones(4), mesh, [Shard(0)])  # sends rank 1 its half

    with pytest.raises(RankFailed, match=r"send \.full_tensor\(\) or \.to_local\(\)"):
        launch(give, nprocs=2)


def test_a_big_captured_value_is_named_in_a_warning(
    ranks2: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    table = torch.ones(8_000_000)
    small = torch.ones(10)
    ranks2(lambda: table.sum() + small.sum())
    warning = capsys.readouterr().err
    assert "this call sends 32 MB to every rank" in warning
    assert "'table', which the function uses: 32 MB" in warning
    assert "small" not in warning


def test_forty_megabytes_of_prints_block_nothing_and_are_all_there() -> None:
    line = "x" * 199

    def talk() -> int:
        for _ in range(100_000):
            print(line)
        return dist.get_rank()

    results = launch(talk, nprocs=2, echo=False)
    assert list(results) == [0, 1]
    assert results.output == ((line + "\n") * 100_000,) * 2


def test_c_code_and_child_processes_print_into_the_same_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def talk() -> None:
        import ctypes

        ctypes.CDLL(None).printf(b"from C %d\n", ctypes.c_int(dist.get_rank()))
        ctypes.CDLL(None).fflush(None)
        subprocess.run(["echo", "from a child"], check=True)
        print("10 %\r50 %\r100 %")

    launch(talk, nprocs=2)
    printed = capsys.readouterr().out.splitlines()
    for rank in (0, 1):
        mine = [line for line in printed if line.startswith(f"[rank {rank}]")]
        said = [f"from C {rank}", "from a child", "100 %"]
        assert mine == [f"[rank {rank}] {text}" for text in said]


def test_a_thread_that_prints_between_two_calls_does_not_block(ranks2: Ranks) -> None:
    def begin() -> None:
        def chatter() -> None:
            for _ in range(40):
                print("y" * 9_999)  # 400 kB in all: a pipe that nobody reads holds 64 kB

        sys.modules["__main__"].chatter = threading.Thread(target=chatter)
        sys.modules["__main__"].chatter.start()

    def finish() -> bool:
        thread = sys.modules["__main__"].chatter
        thread.join(timeout=30)
        return thread.is_alive()

    ranks2(begin)
    assert list(ranks2(finish)) == [False, False]


def test_results_say_what_they_are() -> None:
    results = Results((3, 4), nprocs=2, threads=1, backend="gloo", ready_s=0.08, elapsed_s=0.5)
    assert (results[1], results[:], len(results)) == (4, (3, 4), 2)
    assert repr(results) == (
        "2 ranks, 1 thread each, gloo: ready after 80 ms, done after 500 ms, values [3, 4]"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        results.nprocs = 3  # type: ignore[misc]


def test_reading_standard_input_in_a_rank_ends_at_once(ranks2: Ranks) -> None:
    assert list(ranks2(lambda: sys.stdin.read())) == ["", ""]
    assert list(ranks2(lambda: os.read(0, 10))) == [b"", b""]
