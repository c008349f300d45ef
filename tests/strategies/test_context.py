"""Ring attention and Ulysses equal ordinary attention, and their strategy equals one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pardemo import check, predict, strategies
from pardemo.launch import RankFailed, Ranks
from pardemo.measure import count
from pardemo.models import GPT, GPTConfig
from pardemo.strategies import StrategyError, context, units
from pardemo.strategies.ring_attention import RingAttention, chunks_of, merge, positions_of
from pardemo.strategies.ulysses import UlyssesAttention
from pardemo.workloads import workload
from tests.strategies import unusual

LONG = GPTConfig(vocab_size=256, block_size=48, n_layer=2, n_head=4, n_embd=32)


def test_two_partial_attentions_merge_into_the_whole() -> None:
    q, k, v = (torch.randn(2, 3, 8, 4, dtype=torch.float64) for _ in range(3))
    parts = []
    for keys, values in zip(k.split(5, dim=2), v.split(5, dim=2), strict=True):
        scores = q @ keys.transpose(-1, -2) / 2
        parts += [scores.softmax(dim=-1) @ values, scores.logsumexp(dim=-1)]
    whole = F.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(merge(*parts)[0], whole, atol=1e-12)


@pytest.mark.parametrize("balance", ["contiguous", "zigzag"])
def test_every_position_is_on_exactly_one_rank(balance: str) -> None:
    where = torch.cat([positions_of(rank, 3, 24, balance) for rank in range(3)])
    assert sorted(where.tolist()) == list(range(24))


def attend(kind: str, balance: str, causal: bool) -> tuple[float, int]:
    """Largest difference of output and gradients from ordinary attention, and blocks computed."""
    group = dist.group.WORLD
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = [torch.randn(2, 12, 24, 8, dtype=torch.float64) for _ in range(4)]
    where = positions_of(rank, ranks, 24, balance)
    ring = RingAttention(group, causal, balance)
    own: Any = ring if kind == "ring" else UlyssesAttention(group, causal)
    reference = [t.clone().requires_grad_() for t in whole[:3]]
    expected = F.scaled_dot_product_attention(*reference, is_causal=causal)
    expected.backward(whole[3])
    mine = [t[:, :, where].clone().requires_grad_() for t in whole[:3]]
    out = own(*mine)
    out.backward(whole[3][:, :, where])
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(mine, reference, strict=True))]
    worst = max(float((a - b[:, :, where]).abs().max().detach()) for a, b in pairs)
    return worst, ring.blocks


CASES = [("ring", "contiguous"), ("ring", "zigzag"), ("ulysses", "contiguous")]


@pytest.mark.parametrize(("kind", "balance"), CASES)
@pytest.mark.parametrize("causal", [True, False])
def test_output_and_gradients_are_those_of_ordinary_attention(
    ranks2: Ranks, ranks4: Ranks, kind: str, balance: str, causal: bool
) -> None:
    for ranks in (ranks2, ranks4):
        for worst, _ in ranks(attend, kind, balance, causal):
            assert worst < 1e-13


def test_zigzag_gives_every_rank_the_same_number_of_blocks(ranks4: Ranks) -> None:
    blocks = [value[1] for value in ranks4(attend, "ring", "contiguous", True)]
    assert blocks == [1, 2, 3, 4]
    blocks = [value[1] for value in ranks4(attend, "ring", "zigzag", True)]
    assert blocks == [9, 9, 9, 9]  # of a quarter of the size: 2.25, where the worst was 4
    assert chunks_of(1, 4, "zigzag") == [1, 6]


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"balance": "zigzag"},
        {"method": "ulysses"},
        {"accumulate": 2, "balance": "zigzag"},
    ],
)
def test_context_equals_one_process_after_every_step(
    ranks2: Ranks, ranks4: Ranks, knobs: dict[str, Any]
) -> None:
    for n, ranks in ((2, ranks2), (4, ranks4)):
        for work in (unusual.mini_gpt(LONG), unusual.frozen_gpt()):
            said = check.strategy("context", work, n, batch_size=[4, 3], ranks=ranks, **knobs)
            assert said, said


def test_three_ranks_equal_one_process() -> None:
    with Ranks(3, timeout=120) as ranks:
        work = unusual.mini_gpt(LONG)
        said = check.strategy("context", work, 3, batch_size=2, ranks=ranks, balance="zigzag")
    assert said, said


def sent(knobs: dict[str, Any]) -> dict[str, float]:
    row, work = strategies.get("context"), unusual.mini_gpt(LONG)
    step = row.build(work.make_model(0), work.make_optimizer, work.loss, row.mesh(), **knobs)
    traffic = count(lambda: step.step(work.make_batch(2, 1, 0)))
    return {f.kind: traffic.sent_bytes(kind=f.kind) for f in traffic.flows if f.kind != "recv"}


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_bytes_are_those_of_the_formula(ranks4: Ranks, method: str) -> None:
    one = 2 * LONG.block_size * LONG.n_embd * 4  # samples x positions x width x 4 bytes
    expected = predict.sent_bytes(
        "context", ranks=4, layers=2, kv_bytes=2 * one, variant=method, loss_bytes=4,
        parameters=units.parameters(GPT(LONG)),
    )  # fmt: skip
    for found in ranks4(sent, {"method": method}):
        assert found == expected.by_kind()


def one_step(config: GPTConfig, knobs: dict[str, Any]) -> None:
    row, work = strategies.get("context"), unusual.mini_gpt(config)
    step = row.build(work.make_model(0), work.make_optimizer, work.loss, row.mesh(), **knobs)
    step.step(work.make_batch(2, 0, 0))


@pytest.mark.parametrize(
    ("change", "knobs", "message"),
    [
        ({"block_size": 47}, {}, "47 tokens cannot be cut into 2 equal pieces"),
        ({"block_size": 46}, {"balance": "zigzag"}, "46 tokens cannot be cut into 4"),
        ({"n_head": 1}, {"method": "ulysses"}, "spreads 1 heads over 2 ranks"),
        ({"dropout": 0.1}, {}, "no dropout inside attention, got 0.1"),
        ({}, {"method": "star"}, "one of ring, ulysses, not 'star'"),
        ({}, {"method": "ulysses", "balance": "zigzag"}, "joins whole sequences"),
        ({}, {"balance": "even"}, "not 'even'"),
        ({}, {"library": True}, "no attention handler for CPU tensors"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(
    ranks2: Ranks, change: dict[str, Any], knobs: dict[str, Any], message: str
) -> None:
    with pytest.raises(RankFailed, match=message):
        ranks2(one_step, replace(LONG, **change), knobs)


def test_a_model_without_the_seams_is_refused_before_it_starts(ranks2: Ranks) -> None:
    with pytest.raises(StrategyError, match="no module has a replaceable attention"):
        check.strategy("context", "mlp", 2, ranks=ranks2)
    against = context.reasons_against(unusual.Plain(), 2, 8)
    assert len(against) == 1
    assert not context.reasons_against(GPT(LONG), 2, 8)


def test_the_check_catches_a_rank_that_forgets_where_its_tokens_stand(ranks2: Ranks) -> None:
    def forgetful(model: Any, make_optimizer: Any, loss: Any, mesh: Any) -> Any:
        step = context.build(model, make_optimizer, loss, mesh)
        embed = step.model.embed
        forward = embed.forward

        def forget(tokens: torch.Tensor) -> torch.Tensor:
            embed.positions = None
            return forward(tokens)

        embed.forward = forget
        return step

    work = workload("gpt-mini", batch_size=2)
    said = check.strategy(forgetful, work, 2, axes=("cp",), ranks=ranks2, steps=1)
    assert not said
    assert "drifted" in repr(said)
