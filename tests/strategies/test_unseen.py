"""Models that no strategy was written for: equal to one process, or refused in one plain line."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from pardemo import check, strategies
from pardemo.launch import Ranks
from pardemo.measure import Traffic, count
from pardemo.strategies import StrategyError
from pardemo.workloads import Workload, adamw, workload
from tests.strategies import unseen, unusual

EVERYWHERE = {"data_parallel", "ddp", "zero1", "fsdp", "hsdp"}  # they split only the batch
TRACED = {"model_parallel", "pipeline", "dp_pp"}  # stages found by torch's tracer
SLICED = {"tensor", "dp_tp", "fsdp_tp"}
FITS = {
    "transformer": EVERYWHERE | TRACED | SLICED,
    "padded": EVERYWHERE | TRACED | SLICED,
    "encoder": EVERYWHERE | TRACED | SLICED,
    "lstm": EVERYWHERE | TRACED,
    "unet": EVERYWHERE | TRACED,
    "resnet": EVERYWHERE | TRACED,
    "gpt_tied": EVERYWHERE | TRACED | SLICED,
    "gpt_untied": EVERYWHERE | TRACED | SLICED,
    "batchnorm": EVERYWHERE | TRACED,
    "cumulative": EVERYWHERE,
    "cross": EVERYWHERE | TRACED | SLICED,
    "returns_tuple": EVERYWHERE | SLICED,
    "returns_dict": EVERYWHERE | SLICED,
    "sequential": EVERYWHERE | TRACED | SLICED | {"tp_pp", "dp_pp_tp"},
    "unused": (EVERYWHERE - {"ddp", "zero1"}) | TRACED | SLICED,
    "parametrized": EVERYWHERE | TRACED,
    "careless": EVERYWHERE | TRACED,
    "in_place": EVERYWHERE | TRACED | SLICED,
}


@pytest.fixture(scope="module")
def ranks3() -> Iterator[Ranks]:
    with Ranks(3, timeout=120) as ranks:
        yield ranks


def own(name: str) -> Workload:
    return workload(f"tests.strategies.unseen:{name}")


def test_the_table_has_every_model() -> None:
    assert all(isinstance(own(name).make_model(0), nn.Module) for name in FITS)


@pytest.mark.soak
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", FITS)
def test_every_strategy_equals_one_process_or_says_in_one_line_why_not(
    name: str, size: int
) -> None:
    with Ranks(size, timeout=240) as ranks:
        for strategy in strategies.names():
            if strategy == "single":
                continue
            try:
                said = check.strategy(strategy, own(name), size, batch_size=12, ranks=ranks)
            except StrategyError as error:
                reason = str(error)
                assert "\n" not in reason
                divides = size == 3 and ("divide" in reason or "pieces cannot make" in reason)
                few = "pieces" in reason and "stages" in reason
                wide = "cannot look at all" in reason  # BatchNorm of a traced model, over pipelines
                assert strategy not in FITS[name] or divides or few or wide, reason
            else:
                assert said, f"{strategy}: {said}"


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        ("tensor", "transformer"),
        ("tensor", "cross_causal"),
        ("fsdp_tp", "cross_padded"),
        ("tensor", "cross_heads"),
        ("dp_tp", "cross_three"),
        ("pipeline", "transformer"),
        ("model_parallel", "unet"),
        ("pipeline", "resnet"),
        ("fsdp", "parametrized"),
        ("zero1", "cumulative"),
        ("tp_pp", "encoder"),  # one stage, which is the whole model: nothing to trace
        ("dp_pp_tp", "returns_dict"),
        ("pipeline", "careless"),
        ("pipeline", "in_place"),
        ("model_parallel", "in_place"),
        ("tensor", "in_place"),
        ("fsdp", "in_place"),
    ],
)
def test_two_ranks_equal_one_process(ranks2: Ranks, strategy: str, name: str) -> None:
    said = check.strategy(strategy, own(name), 2, 2, batch_size=12, ranks=ranks2)
    assert said, said


@pytest.mark.parametrize(
    ("strategy", "name"),
    [("ddp", "batchnorm"), ("fsdp", "gpt_tied"), ("pipeline", "gpt_tied"), ("zero1", "lstm")],
)
def test_three_ranks_equal_one_process(ranks3: Ranks, strategy: str, name: str) -> None:
    said = check.strategy(strategy, own(name), 3, batch_size=[12, 12], ranks=ranks3)
    assert said, said


@pytest.mark.parametrize(
    ("strategy", "name"),
    [("tensor", "encoder"), ("dp_tp", "cross"), ("fsdp_tp", "encoder"), ("dp_pp", "gpt_tied"),
     ("dp_tp", "unused"), ("dp_pp", "unused"), ("tp_pp", "sequential")],
)  # fmt: skip
def test_four_ranks_equal_one_process(ranks4: Ranks, strategy: str, name: str) -> None:
    said = check.strategy(strategy, own(name), 4, batch_size=[12, 12], ranks=ranks4)
    assert said, said


def test_heads_that_do_not_divide_are_counted(ranks3: Ranks) -> None:
    with pytest.raises(StrategyError, match=r"the 4 heads of encoder.layers.0.self_attn do not"):
        check.strategy("tensor", own("encoder"), 3, ranks=ranks3)


def test_what_stays_whole_is_named(ranks2: Ranks) -> None:
    said = check.strategy("tensor", own("gpt_tied"), 2, 1, batch_size=4, ranks=ranks2)
    assert (
        "of the parameters stay whole on every rank of the tensor axis: blocks.0.qkv" in said.text
    )
    assert "head" not in check.strategy("fsdp", own("gpt_tied"), 2, 1, ranks=ranks2).text


def test_dropout_is_off_in_the_comparison_and_that_is_said(ranks2: Ranks) -> None:
    said = check.strategy("ddp", own("in_place"), 2, 1, ranks=ranks2)
    assert said, said
    assert "dropout was off in the comparison (1.drop 0.2, 2.drop 0.2): ranks" in said.text
    assert "dropout" not in check.strategy("ddp", own("lstm"), 2, 1, ranks=ranks2).text


def test_a_parameter_without_a_gradient_is_named_before_the_next_step(ranks2: Ranks) -> None:
    for strategy in ("ddp", "zero1"):
        with pytest.raises(StrategyError, match=r"unused.weight, unused.bias took no part"):
            check.strategy(strategy, own("unused"), 2, 1, ranks=ranks2)
        assert check.strategy(strategy, own("unused"), 2, ranks=ranks2, find_unused_parameters=True)


def test_a_buffer_that_averages_a_part_of_the_batch_is_explained(ranks2: Ranks) -> None:
    said = check.strategy("ddp", own("own_average"), 2, 1, ranks=ranks2)
    assert not said
    assert "seen is a buffer that the model updates from the samples it sees" in said.text


def test_a_loss_that_is_no_mean_over_samples_is_refused_where_the_batch_is_split(
    ranks2: Ranks,
) -> None:
    summed = replace(own("sequential"), loss=partial(F.cross_entropy, reduction="sum"))
    for strategy in ("ddp", "pipeline"):
        with pytest.raises(StrategyError, match="ranks that split a batch train something else"):
            check.strategy(strategy, summed, 2, 1, batch_size=4, ranks=ranks2)
    assert check.strategy("tensor", summed, 2, 1, batch_size=4, ranks=ranks2)


def test_what_a_tracer_cannot_follow_is_refused_in_one_line(ranks2: Ranks) -> None:
    for name in ("cumulative", "returns_dict"):
        with pytest.raises(StrategyError, match="pipeline cannot train") as caught:
            check.strategy("pipeline", own(name), 2, ranks=ranks2)
        assert "\n" not in str(caught.value)


def test_costs_decide_where_a_traced_model_is_cut(ranks2: Ranks) -> None:
    for balance in ("measured", [1.0] * 8):
        assert check.strategy(
            "pipeline", own("gpt_tied"), 2, 1, batch_size=4, ranks=ranks2, balance=balance
        )
    with pytest.raises(StrategyError, match="2 costs for 8 pieces"):
        check.strategy("pipeline", own("gpt_tied"), 2, 1, ranks=ranks2, balance=[1.0, 2.0])


class Ties(nn.Sequential):
    """Four pieces; the first shares one weight with the second, another with the fourth."""

    def __init__(self) -> None:
        super().__init__(*(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(4)))
        self[1][0].weight, self[3][1].weight = self[0][0].weight, self[0][1].weight


def ties() -> Workload:
    def batch(size: int, step: int, seed: int) -> Any:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        return tuple(torch.randn(size, 8, generator=generator) for _ in range(2))

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Ties()

    return Workload("ties", make, batch, F.mse_loss, adamw, 8)


def test_ties_among_different_stages_need_no_luck_with_groups(ranks4: Ranks) -> None:
    for strategy, cut in itertools.product(("pipeline", "dp_pp"), range(2)):
        said = check.strategy(strategy, ties(), 4, 2, batch_size=8, ranks=ranks4)
        assert said, f"{strategy}, time {cut}: {said}"


def test_a_layer_of_torchs_own_makes_as_many_all_reduces_as_by_hand(ranks2: Ranks) -> None:
    activation = 12 * unseen.LENGTH * unseen.WIDTH * 4
    for traffic in ranks2(traffic_of, "encoder"):  # attention and feed-forward, each way
        assert traffic.calls(kind="all_reduce", phase="forward") == 2 * 2
        assert traffic.calls(kind="all_reduce", phase="backward") == 2 * 2
        assert traffic.sent_bytes() == 2 * 4 * activation  # 2(t-1)/t = 1 for t = 2
    for traffic in ranks2(traffic_of, "transformer"):
        # backward also sums what the memory gets from each decoder layer's keys and values
        assert traffic.calls(kind="all_reduce", phase="forward") == 2 * 2 + 2 * 3
        assert traffic.calls(kind="all_reduce", phase="backward") == 2 * 2 + 2 * 4
        assert traffic.sent_bytes() == (10 + 12) * activation


def traffic_of(name: str) -> Traffic:
    step, work = build(name, 0)
    batch = work.make_batch(12, 0, 0)
    return count(lambda: step.step(batch), warmup=1)


def test_each_rank_keeps_its_heads_and_hands_out_the_whole(ranks4: Ranks) -> None:
    full = own("cross").make_model(0).state_dict()
    for shapes, before, state, moved in ranks4(share_of):
        assert shapes["attention.in_proj_weight"] == [3 * 8, 32]
        assert shapes["attention.in_proj_bias"] == [3 * 8]
        assert shapes["attention.out_proj.weight"] == [32, 8]
        assert check.same(before, full, 0.0)
        assert check.same(moved, state, 0.0)


def share_of() -> Any:
    (step, work), (other, _) = build("cross", 0), build("cross", 1)
    shapes = {
        name: list(p.to_local().shape if hasattr(p, "to_local") else p.shape)
        for name, p in step.model.named_parameters()
    }
    before = step.state()
    step.step(work.make_batch(12, 0, 0))
    state = step.state()
    other.load(state)
    return shapes, before, state, other.state()


def build(name: str, seed: int) -> tuple[strategies.Step, Workload]:
    return unusual.trainer("tensor", own(name), seed), own(name)
