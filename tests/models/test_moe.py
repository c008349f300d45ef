"""The mixture of experts routes, drops and balances as its docstring says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pardemo.models import GPT, MoEConfig, MoEGPT
from pardemo.models.moe import MoE, layers, moe_loss

SMALL = MoEConfig(vocab_size=50, block_size=8, n_layer=2, n_head=2, n_embd=16)


def layer(**change: object) -> MoE:
    torch.manual_seed(0)
    return MoE(MoEConfig(n_embd=16, **change)).double()  # type: ignore[arg-type]


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_token_gets_the_weighted_sum_of_its_experts(top_k: int) -> None:
    moe = layer(capacity_factor=None, top_k=top_k)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    y, _ = moe(x)
    share = F.softmax(moe.gate(x), dim=-1)
    for b in range(2):
        for t in range(5):
            best = share[b, t].argsort(descending=True)[:top_k]
            weight = share[b, t, best]
            weight = weight / weight.sum() if top_k > 1 else weight
            parts = [
                w * moe.experts[str(int(e))](x[b, t]) for w, e in zip(weight, best, strict=True)
            ]
            assert torch.allclose(y[b, t], sum(parts), atol=1e-12)  # type: ignore[arg-type]


def test_a_full_expert_drops_the_tokens_that_come_last() -> None:
    moe = layer(capacity_factor=0.5, top_k=1)
    torch.nn.init.zeros_(moe.gate.weight)  # all shares equal: everything goes to expert 0
    x = torch.randn(1, 16, 16, dtype=torch.float64)
    y, _ = moe(x)
    capacity = 2  # ceil(0.5 * 16 tokens / 4 experts)
    assert moe.dropped == 16 - capacity
    assert (y[0, :capacity] != 0).any(dim=-1).all()
    assert (y[0, capacity:] == 0).all()
    assert moe.imbalance == 4.0


def test_the_balance_loss_is_its_weight_when_even_and_grows_to_the_number_of_experts() -> None:
    moe = layer(capacity_factor=None, top_k=4, aux_weight=0.5)  # all experts: even by force
    _, even = moe(torch.randn(3, 8, 16, dtype=torch.float64))
    assert even.item() == pytest.approx(0.5)
    moe = layer(capacity_factor=None, top_k=1, aux_weight=0.5)
    with torch.no_grad():
        moe.gate.weight.copy_(torch.zeros(4, 16)).index_fill_(0, torch.tensor([2]), 50.0)
    _, uneven = moe(torch.rand(3, 8, 16, dtype=torch.float64) + 0.1)
    assert uneven.item() == pytest.approx(0.5 * 4, rel=1e-6)


def test_an_expert_without_tokens_still_gets_a_gradient_of_zero() -> None:
    moe = layer(top_k=1)
    torch.nn.init.zeros_(moe.gate.weight)
    y, aux = moe(torch.randn(1, 4, 16, dtype=torch.float64))
    (y.sum() + aux).backward()
    assert all(p.grad is not None for p in moe.parameters())
    assert (moe.experts["3"].up.weight.grad == 0).all()


def test_the_gate_learns_even_when_a_token_visits_one_expert() -> None:
    moe = layer(top_k=1, aux_weight=0.0)
    y, aux = moe(torch.randn(2, 8, 16, dtype=torch.float64))
    (y.square().sum() + aux).backward()
    assert moe.gate.weight.grad.abs().max() > 0


def test_the_sequence_composes_to_forward_and_carries_the_balance_loss() -> None:
    model = MoEGPT(SMALL)
    x = torch.randint(50, (3, 8))
    carried = x
    for name, piece in model.sequence():
        carried = piece(carried)
        assert model.get_submodule(name) is piece
    logits, aux = model(x)
    assert torch.equal(carried[0], logits)
    assert torch.equal(carried[1], aux)
    assert logits.shape == (3, 8, 50)
    assert aux > 0


def test_the_loss_adds_both_and_training_lowers_it() -> None:
    torch.manual_seed(0)
    model = MoEGPT(SMALL)
    x = torch.randint(50, (4, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = moe_loss(model(x), x)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    logits, aux = model(x)
    expected = F.cross_entropy(logits.flatten(0, 1), x.flatten()) + aux
    assert moe_loss((logits, aux), x) == expected


def test_it_has_the_parameters_of_a_gpt_and_those_of_more_experts() -> None:
    def size(model: torch.nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    expert, gate = 2 * 16 * 64, 16 * 4
    assert size(MoEGPT(SMALL)) == size(GPT(SMALL)) + 2 * (3 * expert + gate)
    untied = MoEGPT(MoEConfig(50, 8, 2, 2, 16, tied=False))
    assert size(untied) == size(MoEGPT(SMALL)) + 50 * 16


def test_wrong_sizes_and_early_questions_are_answered_in_words() -> None:
    with pytest.raises(ValueError, match="top_k=5 must lie between 1 and 4 experts"):
        MoEConfig(top_k=5)
    with pytest.raises(RuntimeError, match="run a batch through the model first"):
        print(layers(MoEGPT(SMALL))[0].imbalance)
