"""Collectives by themselves: verified, and their rates by the wire factors."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from pardemo.launch import RankFailed
from pardemo.measure import Timing, collectives, count
from pardemo.measure.collectives import Measured, collective, sweep


def measured(kind, ranks, seconds=0.01, pipelined=1):
    timing = Timing.of([[seconds * pipelined] * 3] * 6)
    return Measured(kind, ranks, 1_000_000, "float32", pipelined, timing)


@pytest.mark.parametrize(
    ("kind", "factor"),
    [("all_reduce", 1.5), ("all_gather", 0.75), ("reduce_scatter", 0.75), ("all_to_all", 0.75),
     ("broadcast", 1), ("reduce", 1), ("send", 1)],
)  # fmt: skip
def test_bus_bandwidth_is_the_algorithms_times_the_factor_of_nccl_tests(kind, factor):
    found = measured(kind, 4)
    assert found.algbw == pytest.approx(1e8)
    assert found.busbw == pytest.approx(factor * 1e8)


def test_operations_in_flight_share_the_time_of_the_step():
    assert measured("send", 2, pipelined=5).time_s == pytest.approx(0.01)
    assert "5 in flight" in repr(measured("send", 2, pipelined=5))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_every_collective_is_verified_on_real_ranks(ranks2, dtype):
    found = sweep(
        sizes=(64,), dtypes=(dtype,), pipelined=(1, 3), ranks=ranks2, rounds=1, max_rounds=1,
        iterations=2, warmup=1,
    )  # fmt: skip
    assert [m.kind for m in found[::2]] == list(collectives.KINDS)
    assert {m.pipelined for m in found} == {1, 3}
    assert all(m.algbw > 0 for m in found)


def test_a_group_of_three_of_four_ranks_can_be_measured(ranks4):
    found = sweep(
        sizes=(96,), world_sizes=(3, 4), ranks=ranks4, rounds=1, max_rounds=1, iterations=1,
        warmup=1,
    )  # fmt: skip
    assert len(found) == 2 * len(collectives.KINDS)


def counted(kind):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    step = collective(kind, 1200).make(mesh)
    return count(step)


@pytest.mark.parametrize("kind", collectives.KINDS)
def test_the_size_is_the_whole_array(ranks2, kind):
    found = ranks2(counted, kind)
    assert found[0].payload_bytes(kind=kind) == 1200
    # of a broadcast and a reduce one of two ranks sends the array; of the others both send as much
    assert max(one.textbook_bytes for one in found) == collectives.factor(kind, 2) * 1200


def lying(mesh):
    def broken(tensor, *args, **kwargs):
        tensor.fill_(3)

    dist.all_reduce, honest = broken, dist.all_reduce
    try:
        return collective("all_reduce", 64).make(mesh)
    finally:
        dist.all_reduce = honest


def test_a_wrong_result_is_an_error_and_not_a_time(ranks2):
    from pardemo.measure import Case, compare

    with pytest.raises(RankFailed, match=r"WrongResult: all_reduce of 16 torch\.float32"):
        compare({"x": Case(lying, ranks=2)}, ranks=ranks2, rounds=1, max_rounds=1)


def test_sizes_and_names_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="no collective 'all_reduc'"):
        collective("all_reduc", 64)
    with pytest.raises(ValueError, match="use a multiple of 8"):
        collective("send", 12)
    with pytest.raises(ValueError, match="no dtype 'float31'"):
        collective("send", 16, "float31")
    assert torch.empty(0).element_size() == 4
