"""Experts on other ranks train as they would at home, whatever the router does."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pardemo import check, predict, strategies
from pardemo.launch import Ranks
from pardemo.measure import count
from pardemo.models.moe import MoEConfig, MoEGPT, layers
from pardemo.strategies import StrategyError, expert, routing
from pardemo.workloads import Workload, sgd, workload
from tests.strategies import unusual

SMALL = MoEConfig(vocab_size=256, block_size=64, n_layer=2, n_head=2, n_embd=16)


def mini_moe(config: MoEConfig = SMALL) -> Workload:
    make = partial(unusual.seeded, partial(MoEGPT, config))
    return replace(workload("moe-mini", batch_size=8), make_model=make)


CONFIGS = [
    {},
    {"capacity_factor": None},
    {"capacity_factor": 0.5, "aux_weight": 1.0},
    {"top_k": 1, "n_experts": 7},
    {"tied": False, "top_k": 3, "n_experts": 5},
]


@pytest.mark.parametrize("change", CONFIGS)
def test_expert_equals_one_process_after_every_step(
    ranks2: Ranks, ranks4: Ranks, change: dict[str, Any]
) -> None:
    work = mini_moe(replace(SMALL, **change))
    for n, ranks in ((2, ranks2), (4, ranks4)):
        said = check.strategy("expert", work, n, batch_size=[8, 8, 7], ranks=ranks)
        assert said, said


def test_three_ranks_share_four_experts_unevenly() -> None:
    assert expert.share(4, 3) == [range(2), range(2, 3), range(3, 4)]
    with Ranks(3, timeout=120) as ranks:
        said = check.strategy("expert", mini_moe(), 3, batch_size=5, ranks=ranks)
    assert said, said


@pytest.mark.parametrize("name", ["ddp", "zero1", "fsdp"])
def test_data_parallel_strategies_count_choices_over_the_whole_batch(
    ranks2: Ranks, name: str
) -> None:
    work = mini_moe(replace(SMALL, capacity_factor=0.5, aux_weight=1.0))
    said = check.strategy(name, work, 2, batch_size=[8, 7], ranks=ranks2)
    assert said, said


@pytest.mark.parametrize("knobs", [{}, {"balance": "zigzag"}, {"method": "ulysses"}])
@pytest.mark.parametrize("change", [{"capacity_factor": 0.5, "aux_weight": 1.0}, *CONFIGS[1:2]])
def test_positions_on_several_ranks_are_counted_in_the_order_of_the_batch(
    ranks2: Ranks, change: dict[str, Any], knobs: dict[str, Any]
) -> None:
    work = mini_moe(replace(SMALL, **change))
    said = check.strategy("context", work, 2, batch_size=[3, 4], ranks=ranks2, **knobs)
    assert said, said


def test_the_check_catches_choices_counted_over_this_ranks_positions(ranks2: Ranks) -> None:
    def forgetful(model: Any, make_optimizer: Any, loss: Any, mesh: Any) -> Any:
        step = strategies.get("context").build(model, make_optimizer, loss, mesh)
        for layer in layers(step.model):
            group, here = layer.exchange.group, layer.exchange.here
            layer.exchange = routing.CountTogether(group, here)  # ranks one after another
            layer.exchange.samples = 0
        return step

    work = mini_moe(replace(SMALL, capacity_factor=0.5))
    row = replace(strategies.get("context"), build=forgetful)
    assert not check.strategy(row, work, 2, batch_size=4, ranks=ranks2)


def test_the_check_catches_a_balance_loss_over_part_of_the_batch(ranks2: Ranks) -> None:
    def forgetful(model: Any, make_optimizer: Any, loss: Any, mesh: Any) -> Any:
        step = strategies.get("ddp").build(model, make_optimizer, loss, mesh)
        for layer in layers(step.model):
            layer.exchange = layer.exchange.here
        return step

    work = mini_moe(replace(SMALL, aux_weight=1.0))
    said = check.strategy(forgetful, work, 2, batch_size=8, ranks=ranks2)
    assert not said
    assert "every rank drifted" in repr(said)


def all_to_one(batch_size: int) -> tuple[float, list[int], dict[str, float]]:
    """A router that sends everything to expert 0: imbalance, rows away per layer, bytes by kind."""
    row, work = strategies.get("expert"), mini_moe(replace(SMALL, top_k=1, capacity_factor=None))
    model = work.make_model(0)
    for layer in layers(model):
        torch.nn.init.zeros_(layer.gate.weight)  # equal shares: topk takes the first expert
    step = row.build(model, sgd, work.loss, row.mesh())
    traffic = count(lambda: step.step(work.make_batch(batch_size, 0, 0)))
    found = layers(step.model)
    kinds = {f.kind: traffic.sent_bytes(kind=f.kind) for f in traffic.flows}
    return found[0].imbalance, [layer.exchange.away_rows for layer in found], kinds


def test_the_worst_router_sends_every_token_to_one_rank(ranks2: Ranks) -> None:
    results = ranks2(all_to_one, 8)
    tokens = 8 * 64 // 2
    assert [value[0] for value in results] == [4.0, 4.0]  # all on one of 4 experts
    assert sorted(value[1] for value in results) == [[0, 0], [tokens, tokens]]


def sent() -> tuple[dict[str, float], list[float], int]:
    row, work = strategies.get("expert"), mini_moe()
    step = row.build(work.make_model(0), sgd, work.loss, row.mesh())
    traffic = count(lambda: step.step(work.make_batch(8, 0, 0)))
    kinds = {f.kind: traffic.sent_bytes(kind=f.kind) for f in traffic.flows}
    rows = [(m.away_rows + m.guest_rows) / 2 for m in routing_layers(step)]
    return kinds, rows, sum(p.numel() for p in step.shared)


def routing_layers(step: Any) -> list[routing.SendToExperts]:
    return [layer.exchange for layer in layers(step.model)]


def test_bytes_are_those_of_the_formula(ranks2: Ranks, ranks4: Ranks) -> None:
    for n, ranks in ((2, ranks2), (4, ranks4)):
        for kinds, rows, shared in ranks(sent):
            one = sum(rows) / len(rows) * SMALL.n_embd * 4
            counts = SMALL.n_experts * 8  # one int64 per expert
            expected = predict.sent_bytes(
                "expert", ranks=n, layers=2, routed_bytes=1, sent_away_bytes=one,
                counts_bytes=counts, shared_parameters=shared, loss_bytes=4,
            )  # fmt: skip
            table = 2 * (n - 1) * counts  # every layer's all-gather of every rank's counts
            assert kinds == {**expected.by_kind(), "all_gather": table}


def held() -> tuple[list[str], int]:
    row, work = strategies.get("expert"), mini_moe()
    step = row.build(work.make_model(0), sgd, work.loss, row.mesh())
    return list(layers(step.model)[0].experts), sum(p.numel() for p in step.model.parameters())


def test_a_rank_keeps_its_share_of_the_experts_only(ranks4: Ranks) -> None:
    whole = sum(p.numel() for p in MoEGPT(SMALL).parameters())
    one_expert = 2 * (2 * 16 * 64)  # in both layers: up and down
    for rank, (names, parameters) in enumerate(ranks4(held)):
        assert names == [str(rank)]
        assert parameters == whole - 3 * one_expert


def clipped(name: str, max_norm: float) -> Any:
    row, work = strategies.get(name), mini_moe()
    mesh = row.mesh() if dist.is_initialized() else None
    step = row.build(work.make_model(0), sgd, work.loss, mesh, clip_grad=max_norm)
    for i in range(2):
        step.step(work.make_batch(8, i, 0))
    return step.state()


def test_clipping_counts_shared_parameters_once_and_every_expert(ranks2: Ranks) -> None:
    reference = clipped("single", 0.1)
    assert check.same(ranks2(clipped, "expert", 0.1), reference, 1e-5)
    assert not check.same(ranks2(clipped, "expert", 100.0), reference, 1e-3)


def saved_and_loaded() -> tuple[Any, Any]:
    work, row = mini_moe(), strategies.get("expert")
    first, second = (
        row.build(work.make_model(seed), partial(torch.optim.SGD, lr=0.1), work.loss, row.mesh())
        for seed in (0, 1)
    )
    first.step(work.make_batch(8, 0, 0))
    second.load(first.state())
    for step in (first, second):
        step.step(work.make_batch(8, 1, 0))
    return first.state(), second.state()


def test_loading_a_full_state_continues_as_if_nothing_had_happened(ranks2: Ranks) -> None:
    for first, second in ranks2(saved_and_loaded):
        assert check.same(second, first, 0.0)
        assert list(first) == list(MoEGPT(SMALL).state_dict())


def test_what_does_not_fit_is_refused_with_the_numbers(ranks2: Ranks) -> None:
    with pytest.raises(StrategyError, match="it has no experts"):
        check.strategy("expert", "mlp", 2, ranks=ranks2)
    against = expert.reasons_against(MoEGPT(SMALL), 8, 4)
    assert against[0] == "4 experts are fewer than 8 ranks"
    assert "a batch of 4 leaves some of 8 ranks" in against[1]
    step = expert.build(MoEGPT(SMALL), sgd, None, None)
    with pytest.raises(StrategyError, match="keys of the state dict differ"):
        step.load({})
