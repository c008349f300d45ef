"""A pipeline equals one process by every schedule, sends what the formula says, refuses clearly."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn

from pardemo import check, predict, strategies
from pardemo.launch import RankFailed, Ranks
from pardemo.measure import Traffic, count
from pardemo.models import GPT, GPTConfig
from pardemo.strategies import StrategyError, base, pipeline_build, pipeline_costs
from pardemo.strategies.pipeline_plan import SCHEDULES, Plan
from pardemo.workloads import Workload, workload
from tests.strategies import unusual

SIZES = [8, 8]


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_every_schedule_equals_one_process_with_a_tied_embedding(
    ranks2: Ranks, schedule: str
) -> None:
    said = check.strategy(
        "pipeline", unusual.mini_gpt(), 2, batch_size=SIZES, ranks=ranks2, schedule=schedule
    )
    assert said, said


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "interleaved_zero_bubble", "dualpipev"])
def test_frozen_layers_keep_their_values_and_the_others_learn(ranks2: Ranks, schedule: str) -> None:
    said = check.strategy(
        "pipeline", frozen(), 2, batch_size=SIZES, ranks=ranks2, schedule=schedule
    )
    assert said, said


@pytest.mark.parametrize(
    "work", [unusual.plain_transformer, unusual.shared_resnet, unusual.shared_linear]
)
def test_a_model_that_names_no_sequence_is_cut_by_the_tracer(
    ranks2: Ranks, work: Callable[[], Workload]
) -> None:
    said = check.strategy("pipeline", work(), 2, batch_size=SIZES, ranks=ranks2, tolerance=1e-7)
    assert said, said


def test_four_ranks_equal_one_process_on_mlp_and_gpt(ranks4: Ranks) -> None:
    for work in (workload("mlp"), unusual.mini_gpt()):
        said = check.strategy("pipeline", work, 4, batch_size=[8, 12, 7], ranks=ranks4)
        assert said, said


def test_one_rank_trains_as_one_process_does() -> None:
    assert check.strategy("pipeline", "mlp", 1, batch_size=SIZES)


@pytest.mark.parametrize(
    "knobs",
    [
        {"clip_grad": 0.1},
        {"clip_grad": 0.1, "schedule": "zbv"},
        {"microbatches": 1, "schedule": "gpipe"},
        {"balance": "measured"},
        {"cut": ["head"]},
        {"balance": [1.0, 1.0, 1.0, 1.0, 9.0, 1.0]},
    ],
)
def test_knobs_leave_the_result_alone(ranks2: Ranks, knobs: dict[str, Any]) -> None:
    single = {k: v for k, v in knobs.items() if k == "clip_grad"}
    found = ranks2(train, unusual.mini_gpt(), knobs)
    assert check.same(list(found), train(unusual.mini_gpt(), single, "single"), 1e-5)


def test_batchnorm_trains_with_one_microbatch_and_is_refused_with_more(ranks2: Ranks) -> None:
    assert check.strategy("pipeline", "resnet-mini", 2, batch_size=SIZES, ranks=ranks2)
    with pytest.raises(StrategyError, match="BatchNorm: it would see 1/4 of the batch"):
        check.strategy("pipeline", "resnet-mini", 2, ranks=ranks2, microbatches=4, batch_size=SIZES)


def test_experts_train_with_one_microbatch_and_are_refused_with_more(ranks2: Ranks) -> None:
    assert check.strategy("pipeline", "moe-mini", 2, batch_size=SIZES, ranks=ranks2)
    with pytest.raises(StrategyError, match=r"mixture of experts: .* 1/4 of the batch"):
        check.strategy("pipeline", "moe-mini", 2, ranks=ranks2, microbatches=4, batch_size=SIZES)


@pytest.mark.parametrize(
    ("schedule", "chunks", "v_shape"),
    [("gpipe", 1, False), ("1f1b", 1, False), ("interleaved1f1b", 2, False), ("zbv", 2, True)],
)
def test_the_bytes_sent_are_two_activations_per_microbatch_and_inner_boundary(
    ranks4: Ranks, schedule: str, chunks: int, v_shape: bool
) -> None:
    work, m = deep_gpt(tied=False), 8
    knobs = {"schedule": schedule, "microbatches": m}
    for rank, traffic in enumerate(ranks4(traffic_of, work, knobs)):
        formula = predict.sent_bytes(
            "pipeline", ranks=4, rank=rank, activation_bytes=2 * 16 * 32 * 4,
            microbatches=m, chunks=chunks, v_shape=v_shape,
        )  # fmt: skip
        assert traffic.sent_bytes(kind="send") == formula.total
        assert traffic.calls(kind="send") == formula.calls("send")


def test_a_tied_embedding_costs_one_all_reduce_between_the_ends(ranks4: Ranks) -> None:
    found = ranks4(traffic_of, deep_gpt(tied=True), {"microbatches": 8})
    shared = 64 * 32 * 4  # vocabulary x hidden x bytes
    sums = [t.sent_bytes(kind="all_reduce") for t in found]
    assert sums == [shared, 0, 0, shared]  # 2(k-1)/k of it for k = 2
    assert [t.calls(kind="all_reduce") for t in found] == [1, 0, 0, 1]


def test_state_goes_out_and_in_and_training_goes_on(ranks2: Ranks) -> None:
    for knobs in ({"schedule": "1f1b"}, {"schedule": "zbv"}):
        for before, after, keys in ranks2(round_trip, unusual.mini_gpt(), knobs):
            assert check.same(after, before, 0.0)
            assert keys == list(unusual.mini_gpt().make_model(0).state_dict())


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"microbatches": 3}, "a batch of 8 cannot be cut into 3 equal microbatches"),
        ({"microbatches": 1}, "1f1b needs at least 2 microbatches on 2 ranks, got 1"),
        ({"schedule": "dualpipev", "microbatches": 2}, "dualpipev needs at least 4 microbatches"),
        ({"schedule": "fifo"}, "no schedule is called 'fifo'"),
        ({"schedule": "zbv", "virtual": 3}, "zbv needs 2 stages per rank, not 3"),
        ({"virtual": 2}, "1f1b runs 1 stage per rank"),
        ({"cut": ["nowhere"]}, "no piece is called 'nowhere'"),
        ({"schedule": "interleaved1f1b", "virtual": 4}, "8 stages but only 4 pieces"),
        ({"balance": "luck"}, "balance is"),
        ({"balance": [1.0, 2.0]}, "2 costs for 4 pieces"),
    ],
)
def test_what_cannot_run_is_refused_on_every_rank_with_the_numbers(
    ranks2: Ranks, knobs: dict[str, Any], said: str
) -> None:
    with pytest.raises(RankFailed, match=said):
        ranks2(train, workload("mlp"), knobs)


def test_a_traced_model_refuses_another_shape_of_microbatch(ranks2: Ranks) -> None:
    with pytest.raises(StrategyError, match=r"was traced for microbatches"):
        check.strategy(
            "pipeline", unusual.plain_transformer(), 2, batch_size=[8, 12], ranks=ranks2,
            microbatches=4,
        )  # fmt: skip


def test_reasons_against_name_the_numbers() -> None:
    model = workload("mlp").make_model(0)
    assert pipeline_build.reasons_against(model, 4, 8) == []
    assert "4 pieces cannot make 8 stages" in pipeline_build.reasons_against(model, 8, 8)[0]
    assert "batch of 2" in pipeline_build.reasons_against(model, 4, 2)[0]


def test_default_microbatches_divide_the_batch_and_suit_the_schedule() -> None:
    assert Plan().count(16, 2) == 4
    assert Plan().count(7, 2) == 7
    assert Plan(schedule="dualpipev").count(16, 4) == 8
    assert Plan(schedule="gpipe").count(1, 4) == 1
    with pytest.raises(StrategyError, match="a batch of 3 has no equal parts"):
        Plan(schedule="1f1b").count(3, 4)


def test_measured_costs_change_neither_gradients_nor_buffers() -> None:
    model = workload("resnet-mini").make_model(0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    costs = pipeline_costs.costs(model, (torch.randn(4, 1, 8, 8),), "measured")
    assert len(costs) == len(base.pieces(model))
    assert min(costs) > 0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def train(work: Workload, knobs: dict[str, Any], name: str = "pipeline") -> Any:
    """Losses and the state after two steps, in this process or on this rank."""
    row = strategies.get(name)
    mesh = row.mesh() if name != "single" else None
    model = work.make_model(0)
    step = row.build(model, work.make_optimizer, work.loss, mesh, **knobs)
    losses = [float(step.step(work.make_batch(8, i, 0))) for i in range(2)]
    return check.Trace(tuple(losses), (step.state(),) * 2)


def traffic_of(work: Workload, knobs: dict[str, Any]) -> Traffic:
    row = strategies.get("pipeline")
    step = row.build(work.make_model(0), work.make_optimizer, work.loss, row.mesh(), **knobs)
    batch = work.make_batch(16, 0, 0)
    return count(lambda: step.step(batch), warmup=1)


def round_trip(work: Workload, knobs: dict[str, Any]) -> Any:
    row = strategies.get("pipeline")
    step = row.build(work.make_model(0), work.make_optimizer, work.loss, row.mesh(), **knobs)
    step.step(work.make_batch(8, 0, 0))
    before = step.state()
    other = row.build(work.make_model(1), work.make_optimizer, work.loss, row.mesh(), **knobs)
    other.load(before)
    after = other.state()
    other.step(work.make_batch(8, 1, 0))
    return before, after, list(after)


def frozen() -> Workload:
    """A stack whose first two Linear layers, and one bias, do not learn."""

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        widths = [64, 32, 32, 32, 10]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.Tanh()]
        model = nn.Sequential(*layers)
        for layer in (model[0], model[2]):
            layer.requires_grad_(False)
        model[4].bias.requires_grad_(False)  # type: ignore[union-attr]
        return model

    digits = workload("mlp")
    return Workload("frozen", make, digits.make_batch, digits.loss, digits.make_optimizer, 8)


def deep_gpt(tied: bool) -> Workload:
    """Six blocks of width 32 over 16 tokens, so that eight stages have a piece each."""
    config = GPTConfig(64, 16, n_layer=6, n_head=4, n_embd=32, tied=tied)

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return GPT(config)

    def batch(size: int, step: int, seed: int) -> Any:
        tokens = torch.randint(64, (size, 17), generator=torch.Generator().manual_seed(step))
        return tokens[:, :-1], tokens[:, 1:]

    like = workload("gpt-mini")
    return Workload("deep gpt", make, batch, like.loss, like.make_optimizer, 16)
