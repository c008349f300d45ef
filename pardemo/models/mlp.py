"""A plain multi-layer perceptron, for the digits; weights start as in He 2015b."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn as nn


class Layer(nn.Module):
    """A Linear layer, followed by ReLU unless it is the last."""

    def __init__(self, inputs: int, outputs: int, last: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        nn.init.kaiming_normal_(self.linear.weight, nonlinearity="linear" if last else "relu")
        nn.init.zeros_(self.linear.bias)
        self.activation = nn.Identity() if last else nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, inputs) -> (batch, outputs)."""
        return self.activation(self.linear(x))


class MLP(nn.Module):
    """Linear layers with ReLU between them; `sizes` are the widths from input to output."""

    def __init__(self, sizes: Sequence[int] = (64, 256, 256, 256, 10)) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"an MLP needs an input and an output size, got sizes={tuple(sizes)}")
        last = len(sizes) - 2
        self.layers = nn.ModuleList(
            Layer(a, b, i == last) for i, (a, b) in enumerate(itertools.pairwise(sizes))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, sizes[0]) -> (batch, sizes[-1])."""
        for layer in self.layers:
            x = layer(x)
        return x

    def sequence(self) -> list[tuple[str, nn.Module]]:
        """The layers, in order: their composition is `forward`."""
        return [(f"layers.{i}", layer) for i, layer in enumerate(self.layers)]
