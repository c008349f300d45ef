"""Parts on ranks and on devices equal one process; every crossing is counted."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn

from pardemo import check, strategies
from pardemo.launch import Ranks
from pardemo.measure import count
from pardemo.strategies import StrategyError, base
from pardemo.strategies.parts_on_ranks import HEADER
from pardemo.workloads import Workload, workload
from tests.strategies import unusual

ROW = "model_parallel"
WORKS = [
    lambda: workload("mlp"),
    unusual.mini_gpt,
    unusual.frozen_gpt,
    lambda: workload("resnet-mini"),
    unusual.shared_linear,
    unusual.shared_resnet,
]


@pytest.mark.parametrize("work", WORKS)
def test_parts_on_two_ranks_equal_one_process(ranks2: Ranks, work: Callable[[], Workload]) -> None:
    said = check.strategy(ROW, work(), 2, batch_size=[8, 8, 1], ranks=ranks2)
    assert said, said


@pytest.mark.parametrize("work", WORKS)
def test_parts_on_four_ranks_equal_one_process(ranks4: Ranks, work: Callable[[], Workload]) -> None:
    said = check.strategy(ROW, work(), 4, batch_size=[8, 7], ranks=ranks4)
    assert said, said


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("devices", [2, 3])
def test_parts_on_devices_equal_one_process(work: Callable[[], Workload], devices: int) -> None:
    said = check.strategy(ROW, work(), devices, batch_size=[8, 7], where="devices")
    assert said, said


def sent(work: Workload, knobs: dict[str, Any]) -> tuple[dict[str, int], Any, Any]:
    row = strategies.get(ROW)
    step = row.build(work.make_model(0), work.make_optimizer, work.loss, row.mesh(), **knobs)
    step.step(work.make_batch(8, 0, 0))
    found: dict[str, int] = {}
    for flow in count(lambda: step.step(work.make_batch(8, 1, 0))).flows:
        found[flow.kind] = found.get(flow.kind, 0) + flow.sent_bytes
    return found, step.names, step.spans


def test_each_boundary_carries_the_activations_there_and_their_gradient_back(
    ranks2: Ranks,
) -> None:
    work = workload("mlp", batch_size=8)
    (first, names, spans), (second, _, _) = ranks2(sent, work, {"starts": ["layers.2"]})
    boundary = 8 * 256 * 4
    assert names == ["layers.0", "layers.1"]
    assert first["send"] == second["send"] == boundary
    assert [s.kind for s in spans] == ["forward", "send", "wait", "backward", "optimizer"]
    assert [s.bytes for s in spans] == [0, boundary, boundary, 0, 0]
    assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(spans))


def test_a_tied_parameter_adds_its_gradient_there_and_back(ranks2: Ranks) -> None:
    (first, _, _), (second, _, _) = ranks2(sent, unusual.mini_gpt(), {})
    boundary, tied = 8 * 16 * 32 * 4, 256 * 32 * 4
    assert first["send"] == boundary + tied
    assert second["send"] == boundary + tied


def test_a_new_shape_is_announced_once(ranks2: Ranks) -> None:
    def first_steps(work: Workload) -> list[int]:
        row = strategies.get(ROW)
        step = row.build(work.make_model(0), work.make_optimizer, work.loss, row.mesh())
        sizes = []
        for size in (8, 8, 6, 8):
            step.step(work.make_batch(size, 0, 0))
            sizes.append(sum(s.bytes == 8 * HEADER for s in step.spans))
        return sizes

    assert list(ranks2(first_steps, workload("mlp"))) == [[1, 0, 1, 0]] * 2


def test_clipping_counts_a_tied_parameter_once(ranks2: Ranks) -> None:
    def train(work: Workload) -> Any:
        row = strategies.get(ROW)
        step = row.build(
            work.make_model(0), work.make_optimizer, work.loss, row.mesh(), clip_grad=0.05
        )
        step.step(work.make_batch(8, 0, 0))
        return step.state()

    work = unusual.mini_gpt()
    single = strategies.get("single").build(
        work.make_model(0), work.make_optimizer, work.loss, None, clip_grad=0.05
    )
    single.step(work.make_batch(8, 0, 0))
    assert check.same(ranks2(train, work), single.state())


def test_on_devices_crossings_are_counted_in_both_directions() -> None:
    work = workload("mlp", batch_size=8)
    step = strategies.get(ROW).build(
        work.make_model(0), work.make_optimizer, work.loss, None,
        where="devices", devices=3, starts=["layers.1", "layers.3"],
    )  # fmt: skip
    step.step(work.make_batch(8, 0, 0))
    found = [(t.source, t.target, t.bytes) for t in step.transfers]
    size = 8 * 256 * 4
    assert found == [(0, 1, size), (1, 2, size), (2, 1, size), (1, 0, size)]


def test_a_piece_used_twice_stays_where_it_is_first_and_the_data_come_back_to_it() -> None:
    work = unusual.shared_linear()
    step = strategies.get(ROW).build(
        work.make_model(0), work.make_optimizer, work.loss, None,
        where="devices", starts=["other"],
    )  # fmt: skip
    step.step(work.make_batch(8, 0, 0))
    assert [(t.source, t.target) for t in step.transfers[:3]] == [(0, 1), (1, 0), (0, 1)]


def fits(model: nn.Module, devices: int) -> list[str]:
    return strategies.reasons_against(ROW, model, devices, 8)


def test_models_that_cannot_be_cut_are_refused_with_what_to_do() -> None:
    assert fits(workload("mlp").make_model(0), 4) == []
    assert "cannot cut 4 pieces into 5 stages" in fits(workload("mlp").make_model(0), 5)[0]
    assert fits(unusual.Plain(), 2) == []  # over ranks it is traced
    work = unusual.plain_transformer()
    with pytest.raises(strategies.StrategyError, match=r"Give it a method `sequence\(\)`"):
        strategies.get(ROW).build(
            work.make_model(0), work.make_optimizer, work.loss, None, where="devices"
        )

    class Leaky(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(2, 2), nn.Linear(2, 2))
            self.scale = nn.Parameter(torch.ones(2))

    assert "scale belongs to no piece" in fits(Leaky(), 2)[0]


def test_a_balanced_cut_keeps_the_uses_of_a_shared_normalisation_together() -> None:
    shared = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared, nn.Linear(4, 4))
    assert base.inseparable(base.pieces(model)) == [[0], [1, 2, 3], [4]]
    assert fits(model, 3) == []
    assert "cannot cut 3 pieces into 4 stages" in fits(model, 4)[0]


def test_wrong_knobs_are_refused() -> None:
    work = workload("mlp")

    def build(**knobs: Any) -> Any:
        return strategies.get(ROW).build(
            work.make_model(0), work.make_optimizer, work.loss, None, **knobs
        )

    with pytest.raises(StrategyError, match="where='gpus'"):
        build(where="gpus")
    with pytest.raises(StrategyError, match="4 pieces need 4 costs, got 2"):
        build(where="devices", costs=[1, 2])
    with pytest.raises(StrategyError, match="no piece is called 'layer'"):
        build(where="devices", starts=["layer"])


def test_statistics_shared_by_two_parts_are_refused_on_ranks_not_silently_wrong() -> None:
    from pardemo.strategies.parts_on_ranks import refuse_shared_statistics

    shared = nn.BatchNorm1d(2)
    with pytest.raises(StrategyError, match=r"b\.running_mean is shared with part 0"):
        refuse_shared_statistics([[("a", shared)], [("b", shared)]])
    refuse_shared_statistics([[("a", shared), ("b", shared)], []])
