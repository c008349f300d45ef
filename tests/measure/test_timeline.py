"""Time lines: intervals and lanes from made-up events, then a real trace of two ranks."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from pardemo.measure import Case, NothingFound, spans, timeline
from pardemo.measure.spans import Event

MS = 1e-3


def op(name, start, end, thread=1, on_gpu=False, correlation=0):
    return Event(name, start * MS, end * MS, thread, on_gpu, correlation)


def kinds(found):
    return {(s.kind, round(s.start_s / MS, 3), round(s.end_s / MS, 3)) for s in found}


def test_a_cpu_lane_splits_forward_backward_optimizer_collective_and_idle():
    found = spans.lane(
        0,
        [
            op("aten::linear", 0, 4),
            op("aten::addmm", 1, 3),
            op("autograd::engine::evaluate_function: AddmmBackward0", 4, 12),
            op("aten::mm", 4, 8),
            op("gloo:all_reduce", 7, 11, thread=2),
            op("Optimizer.step#SGD.step", 12, 14),
            op("aten::add_", 12, 14),
        ],
        16 * MS,
    )
    assert kinds(found) == {
        ("forward", 0, 4), ("backward", 4, 8), ("collective", 7, 11), ("optimizer", 12, 14),
        ("idle", 11, 12), ("idle", 14, 16),
    }  # fmt: skip


def test_waiting_inside_the_backward_is_not_computing():
    found = spans.lane(
        0,
        [
            op("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 0, 10),
            op("aten::mul", 0, 2),
        ],
        10 * MS,
    )
    assert kinds(found) == {("backward", 0, 2), ("idle", 2, 10)}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "collective"),
        ("ncclKernel_AllGather_RING_LL_Sum_int8_t", "collective"),
        ("ncclDevKernel_SendRecv", "transfer"),
        ("Memcpy PtoP (Device -> Device)", "transfer"),
    ],
)
def test_gpu_communication_is_found_by_old_and_new_kernel_names(name, kind):
    found = spans.lane(0, [op(name, 0, 1, on_gpu=True)], 1 * MS)
    assert [s.kind for s in found] == [kind]


def test_a_gpu_kernel_belongs_to_the_phase_that_launched_it():
    found = spans.lane(
        0,
        [
            op("cudaLaunchKernel", 0, 1, correlation=7),
            op("autograd::engine::evaluate_function: MmBackward0", 1, 3),
            op("cudaLaunchKernel", 2, 2.5, correlation=8),
            op("sgemm", 4, 6, on_gpu=True, correlation=7),
            op("sgemm", 6, 9, on_gpu=True, correlation=8),
        ],
        9 * MS,
    )
    assert kinds(found) == {("forward", 4, 6), ("backward", 6, 9), ("idle", 0, 4)}


def test_intervals_are_united_and_overlapped_as_sets():
    assert spans.union([(3, 4), (0, 1), (0.5, 2)]) == [(0, 2), (3, 4)]
    assert spans.union([(0, 1), (1.05, 2)], bridge_s=0.1) == [(0, 2)]
    assert spans.overlap([(0, 4)], [(1, 2), (3, 9)]) == [(1, 2), (3, 4)]
    assert spans.gaps([(1, 2)], 0, 4) == [(0, 1), (2, 4)]
    assert spans.total([(0, 1), (2, 4)]) == 3


def ddp(mesh):
    net = DDP(nn.Linear(64, 64), process_group=mesh.get_group())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        net(torch.ones(8, 64)).sum().backward()
        optimizer.step()

    return step


def transfer(mesh):
    x = torch.ones(1000)
    first = mesh.get_rank() == 0
    return lambda: dist.send(x, 1) if first else dist.recv(x, 0)  # moves 4 kB


@pytest.fixture(scope="module")
def traced(ranks2):
    return timeline(Case(ddp, ranks=2, label="ddp"), ranks=ranks2)


def test_every_rank_shows_a_known_collective_between_forward_and_optimizer(traced):
    for rank in (0, 1):
        mine = [s for s in traced if s.rank == rank]
        first = {kind: min(s.start_s for s in mine if s.kind == kind)
                 for kind in ("forward", "backward", "collective", "optimizer")}  # fmt: skip
        assert first["forward"] < first["backward"] < first["collective"] < first["optimizer"]
        assert {s.name for s in mine if s.kind == "collective"} == {"all_reduce"}


def test_ranks_share_one_clock(traced):
    ends = [max(s.end_s for s in traced if s.rank == r and s.kind == "collective") for r in (0, 1)]
    starts = [
        min(s.start_s for s in traced if s.rank == r and s.kind == "collective") for r in (0, 1)
    ]
    assert max(starts) < min(ends)  # an all-reduce ends nowhere before it began everywhere


def test_a_trace_can_be_saved_for_perfetto(traced, tmp_path):
    rows = json.loads(traced.save(tmp_path / "trace.json").read_text())["traceEvents"]
    names = {row["args"]["name"] for row in rows if row["ph"] == "M"}
    assert names == {"rank 0", "rank 1"}
    assert {row["cat"] for row in rows if row["ph"] == "X"} >= {"forward", "collective", "event"}
    assert all(row["dur"] >= 0 for row in rows if row["ph"] == "X")


def test_the_sentence_names_every_rank_and_what_was_hidden(traced):
    said = repr(traced)
    assert said.startswith("ddp, ")
    assert "rank 0: backward " in said
    assert "hidden" in said


def test_point_to_point_is_a_transfer(ranks2):
    found = timeline(Case(transfer, ranks=2), ranks=ranks2)
    assert {(s.rank, s.name) for s in found if s.kind == "transfer"} == {(0, "send"), (1, "recv")}


def test_a_trace_that_lost_the_collectives_is_an_error_and_not_an_empty_lane(ranks2, monkeypatch):
    monkeypatch.setattr(spans, "_communication", lambda rank, event: None)
    with pytest.raises(NothingFound, match="rank 0 called 1 collectives, and its trace shows none"):
        timeline(Case(ddp, ranks=2), ranks=ranks2)
