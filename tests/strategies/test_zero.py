"""ZeRO-1 equals one process, deals out the optimiser's state, and gathers it whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn

from pardemo import check, predict, strategies
from pardemo.launch import Ranks
from pardemo.measure import count
from pardemo.strategies import units
from pardemo.workloads import Workload, workload
from tests.strategies import unusual

ODD = [8, 8, 7]


@pytest.mark.parametrize(
    "work",
    [
        lambda: workload("mlp"),
        unusual.mini_gpt,
        unusual.frozen_gpt,
        lambda: workload("resnet-mini"),
        unusual.shared_resnet,
        unusual.plain_transformer,
    ],
)
def test_zero1_equals_one_process_after_every_step(
    ranks2: Ranks, work: Callable[[], Workload]
) -> None:
    said = check.strategy("zero1", work(), 2, batch_size=ODD, ranks=ranks2)
    assert said, said


def test_four_ranks_and_accumulation_equal_one_process(ranks4: Ranks) -> None:
    for knobs in ({}, {"accumulate": 2}):
        said = check.strategy("zero1", unusual.mini_gpt(), 4, batch_size=11, ranks=ranks4, **knobs)
        assert said, said


def test_three_ranks_equal_one_process() -> None:
    with Ranks(3, timeout=120) as ranks:
        said = check.strategy("zero1", "mlp", 3, batch_size=ODD, ranks=ranks)
    assert said, said


def two_groups(parameters: Any) -> torch.optim.Optimizer:
    """Weight decay for matrices only, as GPTs are trained."""
    parameters = list(parameters)
    matrices = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1}
    vectors = {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, "lr": 1e-2}
    return torch.optim.AdamW([matrices, vectors], lr=1e-3)


def train(name: str) -> tuple[dict[str, Any], Any, int]:
    """State, whole optimiser state, and bytes of moments kept here."""
    row, work = strategies.get(name), workload("mlp", batch_size=8)
    step = row.build(work.make_model(0), two_groups, work.loss, row.mesh())
    for i in range(3):
        step.step(work.make_batch(8, i, 0))
    inner = getattr(step.optimizer, "optim", step.optimizer)
    kept = sum(v.numel() * 4 for s in inner.state.values() for v in s.values() if v.ndim)
    whole = step.optimizer_state() if name == "zero1" else step.optimizer.state_dict()
    return step.state(), whole, kept


def test_groups_keep_their_settings_and_the_gathered_state_is_the_plain_optimisers(
    ranks2: Ranks,
) -> None:
    state, reference, _ = train("single")
    found = ranks2(train, "zero1")
    assert check.same([value[0] for value in found], state)
    assert found[1][1] is None
    gathered = found[0][1]
    moments = [gathered["state"][i]["exp_avg"] for i in sorted(gathered["state"])]
    expected = [reference["state"][i]["exp_avg"] for i in sorted(reference["state"])]
    assert check.same([moments], expected)
    assert [g["lr"] for g in gathered["param_groups"]] == [1e-3, 1e-2]
    plain = two_groups(workload("mlp").make_model(0).parameters())
    plain.load_state_dict(gathered)  # a single process can go on with it


def test_the_moments_are_dealt_out_and_nobody_keeps_them_twice(ranks2: Ranks) -> None:
    _, _, whole = train("single")
    kept = [value[2] for value in ranks2(train, "zero1")]
    assert sum(kept) == whole
    assert max(kept) < 0.65 * whole


def sent() -> tuple[float, float, float, int]:
    work = workload("mlp", batch_size=8)
    step = unusual.trainer("zero1", work)
    for i in range(2):
        step.step(work.make_batch(8, i, 0))
    traffic = count(lambda: step.step(work.make_batch(8, 2, 0)))
    reduced = traffic.sent_bytes(kind="all_reduce")
    gathers = len(traffic.where(kind="all_gather"))
    handed = traffic.payload_bytes(kind="broadcast"), traffic.sent_bytes(kind="broadcast")
    return reduced, *handed, gathers


def test_it_sends_ddps_gradients_and_every_parameter_once(ranks2: Ranks) -> None:
    parameters = units.parameters(workload("mlp").make_model(0))
    expected = predict.sent_bytes("ddp", ranks=2, parameters=parameters, loss_bytes=4).total
    found = ranks2(sent)
    for reduced, handed_round, own, gathers in found:
        assert reduced == expected
        assert handed_round == 4 * parameters  # as seen by a rank: its own sent, the rest received
        assert 0 < own < handed_round
        assert gathers == 0
    assert sum(own for _, _, own, _ in found) == 4 * parameters


def test_an_unused_branch_needs_the_knob_and_has_it(ranks2: Ranks) -> None:
    work = unusual.branching()
    assert check.strategy("zero1", work, 2, batch_size=8, ranks=ranks2, find_unused_parameters=True)


def test_a_rank_may_own_no_tensor_at_all(ranks4: Ranks) -> None:
    def two_tensors(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Linear(64, 10)

    base = workload("mlp")
    work = Workload("one-layer", two_tensors, base.make_batch, base.loss, base.make_optimizer, 8)
    said = check.strategy("zero1", work, 4, batch_size=8, ranks=ranks4)
    assert said, said
