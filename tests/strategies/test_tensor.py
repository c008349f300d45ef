"""Tensor parallelism equals one process, makes 4 all-reduces per layer, and finds its own plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from pardemo import check, strategies
from pardemo.launch import RankFailed, Ranks
from pardemo.measure import Traffic, count
from pardemo.models import MLP, GPTConfig
from pardemo.strategies import tensor_plans
from pardemo.workloads import Workload, workload
from tests.strategies import unusual

SIZES = [4, 5]
LAYERS, ACTIVATION = 3, 4 * 16 * 32 * 4  # of unusual.mini_gpt with 4 samples of 16 tokens


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"sequence_parallel": True},
        {"loss_parallel": True},
        {"sequence_parallel": True, "loss_parallel": True},
    ],
)
def test_a_gpt_equals_one_process_with_every_knob(
    ranks2: Ranks, tied: bool, knobs: dict[str, Any]
) -> None:
    said = check.strategy("tensor", gpt(tied), 2, batch_size=SIZES, ranks=ranks2, **knobs)
    assert said, said


@pytest.mark.parametrize("work", [lambda: workload("mlp"), unusual.plain_transformer])
def test_the_plan_of_other_models_is_found_and_right(
    ranks2: Ranks, work: Callable[[], Workload]
) -> None:
    said = check.strategy("tensor", work(), 2, batch_size=SIZES, ranks=ranks2, tolerance=1e-7)
    assert said, said


def test_four_ranks_equal_one_process(ranks4: Ranks) -> None:
    for work, knobs in (
        (workload("mlp"), {}),
        (unusual.frozen_gpt(), {}),
        (unusual.mini_gpt(), {"sequence_parallel": True, "loss_parallel": True}),
    ):
        said = check.strategy("tensor", work, 4, batch_size=SIZES, ranks=ranks4, **knobs)
        assert said, said


def test_one_rank_trains_as_one_process_does() -> None:
    assert check.strategy("tensor", "mlp", 1, batch_size=SIZES)


@pytest.mark.parametrize("knobs", [{}, {"sequence_parallel": True}, {"loss_parallel": True}])
def test_clipping_uses_the_norm_of_the_full_gradient(ranks2: Ranks, knobs: dict[str, Any]) -> None:
    clipped = ranks2(train, unusual.mini_gpt(), "tensor", {"clip_grad": 0.05, **knobs})
    alone = train(unusual.mini_gpt(), "single", {"clip_grad": 0.05})
    assert check.same(list(clipped), alone)  # float32
    assert not check.same(train(unusual.mini_gpt(), "single", {}), alone, 1e-3)


def test_a_layer_costs_four_all_reduces_two_each_way(ranks2: Ranks) -> None:
    for traffic in ranks2(traffic_of, unusual.mini_gpt(), {}):
        for phase in ("forward", "backward"):
            assert traffic.calls(kind="all_reduce", phase=phase) == 2 * LAYERS
            assert traffic.payload_bytes(phase=phase) == 2 * LAYERS * ACTIVATION
        assert traffic.sent_bytes() == 4 * LAYERS * ACTIVATION  # 2(t-1)/t = 1 for t = 2


def test_an_mlps_first_pair_needs_no_sum_of_its_inputs_gradient(ranks4: Ranks) -> None:
    for traffic in ranks4(traffic_of, workload("mlp"), {}):
        assert traffic.calls(kind="all_reduce", phase="forward") == 2
        assert traffic.calls(kind="all_reduce", phase="backward") == 1
        pair_outputs = 4 * (256 + 10) * 4  # batch x features x bytes
        assert traffic.sent_bytes(phase="forward") == 2 * 3 / 4 * pair_outputs


def test_sequence_parallel_gathers_and_scatters_instead(ranks2: Ranks) -> None:
    for traffic in ranks2(traffic_of, unusual.mini_gpt(), {"sequence_parallel": True}):
        assert traffic.calls(kind="reduce_scatter") == 4 * LAYERS
        assert traffic.calls(kind="all_gather") == 4 * LAYERS + 2  # before head, after embedding
        assert traffic.payload_bytes(kind="all_gather") == (4 * LAYERS + 2) * ACTIVATION
        assert traffic.payload_bytes(kind="reduce_scatter") == 4 * LAYERS * ACTIVATION
        norms = traffic.where(kind="all_reduce")
        assert sum(f.payload_bytes for f in norms) == (2 * LAYERS + 1) * 32 * 4


def test_loss_parallel_sends_three_numbers_per_token(ranks2: Ranks) -> None:
    plain = ranks2(traffic_of, gpt(False), {})[0]
    split = ranks2(traffic_of, gpt(False), {"loss_parallel": True})[0]
    tokens = 4 * 16
    more = split.payload_bytes(phase="forward") - plain.payload_bytes(phase="forward")
    assert more == 3 * tokens * 4
    back = split.payload_bytes(phase="backward") - plain.payload_bytes(phase="backward")
    assert back == ACTIVATION  # the gradient before the head
    assert split.payload_bytes() < plain.payload_bytes() + tokens * 256 * 4  # never the logits


def test_each_rank_holds_its_share_and_state_is_full(ranks4: Ranks) -> None:
    full = unusual.mini_gpt().make_model(0).state_dict()
    for held, state, moved in ranks4(share_of, unusual.mini_gpt()):
        assert held["blocks.0.attn.wq.weight"] == [8, 32]
        assert held["blocks.0.attn.wo.weight"] == [32, 8]
        assert held["blocks.0.mlp.up.weight"] == [32, 32]
        assert held["blocks.0.norm1.weight"] == [32]
        assert {key: value.shape for key, value in state.items()} == {
            key: value.shape for key, value in full.items()
        }
        assert check.same(moved, state, 0.0)


@pytest.mark.parametrize(
    ("work", "knobs", "said"),
    [
        (lambda: workload("resnet-mini"), {}, "has no Linear, elementwise, Linear"),
        (lambda: gpt(True, heads=2, hidden=34), {}, "the 2 heads of .* do not divide by 4 ranks"),
        (lambda: mlp(6), {}, "the 6 hidden features of 0 do not divide by 4 ranks"),
        (lambda: workload("mlp"), {"sequence_parallel": True}, "sequence_parallel needs a model"),
        (lambda: workload("moe-mini"), {"sequence_parallel": True}, "loss of 2 layers of experts"),
        (lambda: gpt(True, vocabulary=258), {"loss_parallel": True}, "258 does not divide by 4"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_numbers(
    ranks4: Ranks, work: Callable[[], Workload], knobs: dict[str, Any], said: str
) -> None:
    with pytest.raises(RankFailed, match=said):
        ranks4(train, work(), "tensor", knobs)


def test_pairs_are_found_through_gates_and_never_through_norms_or_ties() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x))

    (pair,) = tensor_plans.pairs(nn.Sequential(Gated(), nn.LayerNorm(8), nn.Linear(8, 4)))
    assert pair.columns == ("0.gate", "0.up")
    assert (pair.rows, pair.units) == ("0.down", 16)
    norm_between = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    assert tensor_plans.pairs(norm_between) == []
    tied = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    tied[2].weight = tied[0].weight
    assert tensor_plans.pairs(tied) == []
    softmax = nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1), nn.Linear(8, 8))
    assert tensor_plans.pairs(softmax) == []
    assert [p.rows for p in tensor_plans.pairs(MLP())] == ["layers.1.linear", "layers.3.linear"]


def train(work: Workload, name: str, knobs: dict[str, Any]) -> Any:
    row = strategies.get(name)
    mesh = row.mesh() if name != "single" else None
    step = row.build(work.make_model(0), work.make_optimizer, work.loss, mesh, **knobs)
    losses = [float(step.step(work.make_batch(8, i, 0))) for i in range(2)]
    return check.Trace(tuple(losses), (step.state(),) * 2)


def traffic_of(work: Workload, knobs: dict[str, Any]) -> Traffic:
    row = strategies.get("tensor")
    step = row.build(work.make_model(0), work.make_optimizer, work.loss, row.mesh(), **knobs)
    batch = work.make_batch(4, 0, 0)
    return count(lambda: step.step(batch), warmup=1)


def share_of(work: Workload) -> Any:
    row = strategies.get("tensor")
    step, other = (
        row.build(work.make_model(seed), work.make_optimizer, work.loss, row.mesh())
        for seed in (0, 1)
    )
    held = {
        name: list(p.to_local().shape if hasattr(p, "to_local") else p.shape)
        for name, p in step.model.named_parameters()
    }
    state = step.state()
    other.load(state)
    return held, state, other.state()


def gpt(tied: bool, heads: int = 4, hidden: int = 32, vocabulary: int = 256) -> Workload:
    config = GPTConfig(vocabulary, 16, n_layer=LAYERS, n_head=heads, n_embd=hidden, tied=tied)
    return unusual.mini_gpt(config)


def mlp(hidden: int) -> Workload:
    digits = workload("mlp")

    def make(seed: int) -> nn.Module:
        return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))

    return Workload("mlp", make, digits.make_batch, digits.loss, digits.make_optimizer, 8)
