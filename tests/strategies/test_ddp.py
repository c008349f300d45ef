"""DDP equals one process whatever its knobs, sends the formula's bytes, joins uneven ranks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pardemo import check, strategies
from pardemo.launch import RankFailed, Ranks
from pardemo.measure import count
from pardemo.strategies import StrategyError
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
        unusual.shared_linear,
        unusual.plain_transformer,
    ],
)
def test_ddp_equals_one_process_after_every_step(
    ranks2: Ranks, work: Callable[[], Workload]
) -> None:
    said = check.strategy("ddp", work(), 2, batch_size=ODD, ranks=ranks2)
    assert said, said


@pytest.mark.parametrize(
    "knobs",
    [
        {"bucket_cap_mb": 0.01},
        {"gradient_as_bucket_view": True},
        {"static_graph": True},
        {"static_graph": True, "accumulate": 3},
        {"accumulate": 2, "gradient_as_bucket_view": True},
        {"find_unused_parameters": True},
        {"compile": "aot_eager"},
    ],
)
def test_every_knob_leaves_the_result_alone(ranks2: Ranks, knobs: dict[str, Any]) -> None:
    said = check.strategy("ddp", "mlp", 2, batch_size=ODD, ranks=ranks2, **knobs)
    assert said, said


@pytest.mark.soak
@pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")),
    reason="torch.compile's inductor needs a C++ compiler (c++, g++ or clang++) and found none",
)
def test_compiled_code_equals_one_process_in_plain_python(ranks2: Ranks) -> None:
    said = check.strategy("ddp", "mlp", 2, batch_size=ODD, ranks=ranks2, compile="inductor")
    assert said, said


def test_four_ranks_with_parts_of_unequal_size_equal_one_process(ranks4: Ranks) -> None:
    for work in (unusual.mini_gpt(), workload("resnet-mini")):
        said = check.strategy("ddp", work, 4, batch_size=[8, 7, 5], ranks=ranks4)
        assert said, said


def test_three_ranks_equal_one_process_too_whichever_way_the_model_is_spread() -> None:
    with Ranks(3, timeout=120) as ranks:
        for name in ("ddp", "model_parallel"):
            for work in (unusual.mini_gpt(), workload("resnet-mini")):
                said = check.strategy(name, work, 3, batch_size=[8, 7], ranks=ranks)
                assert said, said


def test_a_branch_without_gradients_needs_find_unused_parameters(ranks2: Ranks) -> None:
    work = unusual.branching()
    assert check.strategy("ddp", work, 2, batch_size=8, ranks=ranks2, find_unused_parameters=True)


def train(knobs: dict[str, Any], steps: int = 3, name: str = "mlp") -> tuple[list[float], Any]:
    work = workload(name, batch_size=8)
    torch.manual_seed(0)
    step = unusual.trainer("ddp", work, **knobs)
    losses = [float(step.step(work.make_batch(8, i, 0))) for i in range(steps)]
    return losses, step.state()


def test_clipping_uses_the_norm_of_the_whole_batchs_gradient(ranks2: Ranks) -> None:
    clipped = ranks2(train, {"clip_grad": 0.1})
    work, single = workload("mlp", batch_size=8), strategies.get("single")
    step = single.build(work.make_model(0), work.make_optimizer, work.loss, None, clip_grad=0.1)
    losses = [float(step.step(work.make_batch(8, i, 0))) for i in range(3)]
    assert check.same([value[1] for value in clipped], step.state(), 1e-6)
    assert check.same([value[0] for value in clipped], losses, 1e-6)
    free = ranks2(train, {})
    assert not check.same([value[1] for value in free], step.state(), 1e-3)


def test_half_precision_hooks_round_and_powersgd_keeps_ranks_equal(ranks2: Ranks) -> None:
    exact = ranks2(train, {"bucket_cap_mb": 0.1})[0][1]
    for hook, tolerance in (("fp16", 1e-3), ("bf16", 1e-2)):
        found = ranks2(train, {"comm_hook": hook, "bucket_cap_mb": 0.1})
        states = [value[1] for value in found]
        assert check.same(states, exact, tolerance)
        assert not check.same(states, exact, 1e-8)
        assert check.same([states[1]], states[0], 0.0)
    knobs = {"comm_hook": "powersgd", "bucket_cap_mb": 0.1, "powersgd_rank": 2}  # five buckets
    losses, states = zip(*ranks2(train, knobs, steps=30), strict=True)
    assert check.same([states[1]], states[0], 0.0)
    assert losses[0][-1] < losses[0][0]


def test_the_noop_hook_sends_nothing_and_check_catches_the_drift(ranks2: Ranks) -> None:
    said = check.strategy("ddp", "mlp", 2, batch_size=8, ranks=ranks2, comm_hook="noop")
    assert not said
    assert "drifted" in repr(said)


def sent(knobs: dict[str, Any], name: str = "mlp") -> dict[str, int]:
    """Bytes per kind of collective of the third step; earlier ones rebuild buckets."""
    work = workload(name, batch_size=8)
    step = unusual.trainer("ddp", work, **knobs)
    for i in range(2):
        step.step(work.make_batch(8, i, 0))
    found: dict[str, int] = {}
    for flow in count(lambda: step.step(work.make_batch(8, 2, 0))).flows:
        found[flow.kind] = found.get(flow.kind, 0) + flow.payload_bytes
    return found


PARAMETERS = 64 * 256 + 256 + 2 * (256 * 256 + 256) + 256 * 10 + 10
LOSS = 4  # the mean loss is one float32


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, 4 * PARAMETERS + LOSS),
        ({"bucket_cap_mb": 0.1}, 4 * PARAMETERS + LOSS),
        ({"accumulate": 4}, 4 * PARAMETERS + LOSS),
        ({"comm_hook": "fp16"}, 2 * PARAMETERS + LOSS),
        ({"comm_hook": "bf16"}, 2 * PARAMETERS + LOSS),
        ({"comm_hook": "noop"}, LOSS),
    ],
)
def test_bytes_are_those_of_the_formula(
    ranks2: Ranks, knobs: dict[str, Any], expected: int
) -> None:
    for found in ranks2(sent, knobs):
        assert found == {"all_reduce": expected}


def test_powersgd_sends_the_factors_and_the_vectors(ranks2: Ranks) -> None:
    factors = 2 * ((64 + 256) + 2 * (256 + 256) + (256 + 10))
    vectors = 3 * 256 + 10
    found = ranks2(sent, {"comm_hook": "powersgd", "powersgd_rank": 2})[0]
    assert found == {"all_reduce": 4 * (factors + vectors) + LOSS}


def uneven(counts: list[int], shadow: bool = True) -> dict[str, torch.Tensor]:
    import torch.distributed as dist

    work, row = workload("mlp"), strategies.get("ddp")
    step = row.build(work.make_model(dist.get_rank()), work.make_optimizer, work.loss, row.mesh())
    mine = [work.make_batch(4, 10 * dist.get_rank() + i, 0) for i in range(counts[dist.get_rank()])]
    step.uneven(mine, shadow)
    return step.state()


def test_join_averages_over_the_ranks_still_at_work(ranks2: Ranks) -> None:
    found = ranks2(uneven, [3, 5])
    work = workload("mlp")
    model = work.make_model(0)
    optimizer = work.make_optimizer(model.parameters())
    for i in range(5):
        optimizer.zero_grad()
        still = [rank for rank, batches in enumerate([3, 5]) if i < batches]
        for rank in still:
            inputs, targets = work.make_batch(4, 10 * rank + i, 0)
            (work.loss(model(inputs), targets) / len(still)).backward()
        optimizer.step()
    assert check.same(found, model.state_dict())


def test_without_join_running_out_is_an_error_on_every_rank_not_a_hang() -> None:
    with Ranks(2, timeout=60) as ranks, pytest.raises(RankFailed, match="exhausted all inputs"):
        ranks(uneven, [1, 2], shadow=False)


def test_what_does_not_fit_is_refused_with_the_numbers(ranks2: Ranks) -> None:
    with pytest.raises(StrategyError, match="a batch of 1 leaves some of 2 ranks"):
        check.strategy("ddp", "mlp", 2, batch_size=1, ranks=ranks2)
    with pytest.raises(StrategyError, match="comm_hook='fp8' is not one of fp16"):
        strategies.get("ddp").build(torch.nn.Linear(1, 1), None, None, None, comm_hook="fp8")


def test_loading_a_full_state_continues_as_if_nothing_had_happened(ranks2: Ranks) -> None:
    states = ranks2(saved_and_loaded)
    assert check.same([value[1] for value in states], states[0][0], 0.0)


def saved_and_loaded() -> tuple[Any, Any]:
    work, row = workload("resnet-mini", batch_size=8), strategies.get("ddp")

    def make(seed: int) -> Any:
        from pardemo.workloads import sgd

        def plain(parameters: Any) -> Any:
            return sgd(parameters)

        return row.build(work.make_model(seed), plain, work.loss, row.mesh())

    first, second = make(0), make(1)
    second.load(first.state())
    for step in (first, second):
        step.step(work.make_batch(8, 0, 0))
    return first.state(), second.state()


def test_at_degree_one_it_is_one_process() -> None:
    row, work = strategies.get("ddp"), workload("mlp", batch_size=8)
    step = row.build(work.make_model(0), work.make_optimizer, work.loss, None)
    assert type(step.model) is type(work.make_model(0))
    single = strategies.get("single").build(
        work.make_model(0), work.make_optimizer, work.loss, None
    )
    for i in range(2):
        batch = work.make_batch(8, i, 0)
        assert float(step.step(batch)) == float(single.step(batch))
    assert check.same([step.state()], single.state(), 0.0)
