"""Models have the published sizes, say their order truly, and depend on nothing but the seed."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from pardemo import models
from pardemo.models import GPT, MLP, GPTConfig, ResNet18, ResNet50
from pardemo.models.resnet import Basic, Bottleneck, ResNet

SMALL_GPT = GPTConfig(vocab_size=50, block_size=8, n_layer=2, n_head=2, n_embd=16)


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (ResNet18, 11_689_512),  # torchvision's published counts, 1000 classes
        (ResNet50, 25_557_032),
        (lambda: GPT(GPTConfig.gpt2()), 124_439_808),  # Radford 2019's smallest, as released
        (lambda: MLP((64, 256, 10)), 64 * 256 + 256 + 256 * 10 + 10),
    ],
)
def test_parameter_counts_are_the_published_ones(make: object, count: int) -> None:
    with torch.device("meta"):
        assert models.parameters(make()) == count  # type: ignore[operator]


CASES: list[tuple[nn.Module, torch.Tensor]] = [
    (MLP(), torch.randn(3, 64)),
    (ResNet(Basic, (1, 2), 10, 1, width=4, small_images=True), torch.randn(3, 1, 8, 8)),
    (ResNet(Bottleneck, (1, 1), 10, width=4), torch.randn(3, 3, 32, 32)),
    (GPT(SMALL_GPT), torch.randint(50, (3, 8))),
]


@pytest.mark.parametrize(("model", "x"), CASES)
def test_the_sequence_composes_to_forward_and_names_prefix_the_state(
    model: nn.Module, x: torch.Tensor
) -> None:
    model.eval()
    y: torch.Tensor = x
    for name, piece in model.sequence():  # type: ignore[operator]
        y = piece(y)
        assert model.get_submodule(name) is piece
    assert torch.equal(y, model(x))
    names = [name for name, _ in model.sequence()]  # type: ignore[operator]
    for key in model.state_dict():
        assert sum(key.startswith(name + ".") for name in names) == 1, key


@pytest.mark.parametrize(("size", "small"), [(8, True), (32, True), (64, False)])
def test_resnets_take_small_images_with_the_small_stem(size: int, small: bool) -> None:
    model = ResNet(Basic, (1, 1, 1, 1), 10, width=4, small_images=small)
    assert model(torch.randn(2, 3, size, size)).shape == (2, 10)


def test_the_small_stem_keeps_the_resolution_that_the_published_one_quarters() -> None:
    x = torch.randn(1, 3, 32, 32)
    assert ResNet18(10, small_images=True).stem(x).shape[-1] == 32
    assert ResNet18(10).stem(x).shape[-1] == 8


def test_a_tied_head_is_the_token_embedding_and_an_untied_one_is_not() -> None:
    tied, untied = GPT(SMALL_GPT), GPT(GPTConfig(50, 8, 2, 2, 16, tied=False))
    assert tied.head.weight is tied.embed.tok.weight
    assert "head.weight" in tied.state_dict()
    assert models.parameters(untied) - models.parameters(tied) == 50 * 16


def test_no_token_sees_a_later_one() -> None:
    model = GPT(SMALL_GPT).eval()
    x = torch.randint(50, (1, 8))
    changed = x.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 50
    a, b = model(x), model(changed)
    assert torch.equal(a[0, :5], b[0, :5])
    assert not torch.equal(a[0, 5:], b[0, 5:])


def test_positions_can_be_given_for_a_part_of_the_sequence() -> None:
    model = GPT(SMALL_GPT)
    x = torch.randint(50, (2, 8))
    whole = model.embed(x)
    model.embed.positions = torch.tensor([2, 3, 6])
    assert torch.equal(model.embed(x[:, [2, 3, 6]]), whole[:, [2, 3, 6]])


def test_dropout_is_off_by_default_and_at_its_published_rate_when_asked() -> None:
    assert {m.p for m in GPT(SMALL_GPT).modules() if isinstance(m, nn.Dropout)} == {0.0}
    with torch.device("meta"):
        published = GPT(GPTConfig.gpt2(dropout=0.1))
    assert {m.p for m in published.modules() if isinstance(m, nn.Dropout)} == {0.1}


def test_impossible_sizes_are_refused_with_their_values() -> None:
    with pytest.raises(ValueError, match="n_embd=30 is not divisible by n_head=4"):
        GPTConfig(n_embd=30, n_head=4)
    with pytest.raises(ValueError, match="9 tokens exceed block_size=8"):
        GPT(SMALL_GPT)(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"sizes=\(3,\)"):
        MLP((3,))
