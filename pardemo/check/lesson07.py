"""Checks of lesson 07: bytes of tensor parallelism, how far it can be cut, a bias added once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pardemo.check.verdict import NotYet, demand, verdict


@verdict
def sent_bytes(answer: Callable[..., float]) -> str:
    """`answer(batch, tokens, hidden, layers, t)`: bytes each of t ranks sends per step, fp32."""
    demand(answer(8, 64, 128, 4, 1), 0, "One rank sums with nobody.")
    for batch, tokens, hidden, layers, ranks in ((8, 64, 128, 4, 2), (2, 10, 6, 3, 4)):
        activation = 4 * batch * tokens * hidden
        demand(
            answer(batch, tokens, hidden, layers, ranks),
            4 * layers * 2 * (ranks - 1) / ranks * activation,
            f"{layers} layers, {ranks} ranks: four all-reduces of the activation per layer, each "
            "2 (t-1)/t of its bytes.",
        )
    gpt2 = answer(8, 1024, 768, 12, 8)
    return f"gpt2 with 8 sequences of 1024 tokens on 8 ranks: {gpt2 / 1e6:.0f} MB per step"


@verdict
def most_ranks(answer: Callable[[int, int, int], int]) -> str:
    """`answer(heads, hidden, available)`: most ranks over which attention and MLP divide."""
    for heads, hidden, available in ((12, 768, 8), (16, 1024, 8), (7, 448, 4), (8, 64, 100)):
        expected = max(
            t for t in range(1, available + 1) if heads % t == 0 and (4 * hidden) % t == 0
        )
        demand(
            answer(heads, hidden, available),
            expected,
            f"{heads} heads, hidden size {hidden}, {available} ranks: every rank needs whole heads "
            "and the same number of the 4 x hidden features.",
        )
    return "12 heads on 8 ranks: only 6 can be used"


@verdict
def row_linear(answer: Callable[[list[Any], list[Any], Any], Any]) -> str:
    """`answer(inputs, weights, bias)`: a Linear from the slices of t ranks; bias added once."""
    for ranks in (1, 2, 4):
        seed = torch.Generator().manual_seed(ranks)
        x, weight, bias = (torch.randn(n, generator=seed) for n in ((3, 8), (5, 8), (5,)))
        got = answer(list(x.chunk(ranks, 1)), list(weight.chunk(ranks, 1)), bias)
        expected = torch.nn.functional.linear(x, weight, bias)
        if not isinstance(got, torch.Tensor) or got.shape != expected.shape:
            raise NotYet(type(got).__name__, f"a tensor of shape {tuple(expected.shape)}")
        wrong = float((got - expected).abs().max())
        if wrong > 1e-4:
            hint = "The sum over ranks also sums what every rank adds: how often is the bias in it?"
            raise NotYet(f"off by {wrong:.3g} with {ranks} ranks", "the whole layer's output", hint)
    return "one rank adds the bias, or everybody adds it after the sum"
