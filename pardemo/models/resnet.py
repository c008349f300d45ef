"""Residual networks as published (He 2015, table 1): 18 and 50 layers, and narrow ones for tests.

With 1000 classes ResNet18 has 11,689,512 parameters and ResNet50 25,557,032.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn


class _Block(nn.Module):
    """A residual block: `body` beside `shortcut`, added, then ReLU."""

    def __init__(self, body: nn.Module, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = body
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, inputs, h, w) -> (batch, outputs, h / stride, w / stride)."""
        return torch.relu(self.body(x) + self.shortcut(x))


class Basic(_Block):
    """Two 3x3 convolutions (He 2015, figure 5 left)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        body = nn.Sequential(
            nn.Conv2d(inputs, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        super().__init__(body, inputs, width, stride)


class Bottleneck(_Block):
    """1x1, 3x3, 1x1 convolutions (He 2015, figure 5 right); the 3x3 carries the stride."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        outputs = width * self.expansion
        body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        super().__init__(body, inputs, outputs, stride)


class ResNet(nn.Module):
    """Stem, four groups of residual blocks, average pool, linear head.

    `depths` are blocks per group, `width` the channels of the first group. `small_images` takes
    a 3x3 stem without pooling, for images of 8x8 to 32x32 pixels.
    """

    def __init__(
        self, block: type[Basic] | type[Bottleneck], depths: Sequence[int], classes: int = 1000,
        channels: int = 3, width: int = 64, small_images: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        kernel, stride = (3, 1) if small_images else (7, 2)
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Identity() if small_images else nn.MaxPool2d(3, 2, 1),
        )
        self.blocks, inputs = nn.ModuleList(), width
        for group, depth in enumerate(depths):
            for i in range(depth):
                step = 2 if group > 0 and i == 0 else 1
                self.blocks.append(block(inputs, width * 2**group, step))
                inputs = width * 2**group * block.expansion
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
        self.apply(_initialise)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, h, w) -> (batch, classes)."""
        for _, piece in self.sequence():
            x = piece(x)
        return x

    def sequence(self) -> list[tuple[str, nn.Module]]:
        """Stem, blocks and head, in order: their composition is `forward`."""
        middle = [(f"blocks.{i}", block) for i, block in enumerate(self.blocks)]
        return [("stem", self.stem), *middle, ("head", self.head)]


def ResNet18(classes: int = 1000, small_images: bool = False) -> ResNet:
    """The 18-layer residual network: 11,689,512 parameters at 1000 classes."""
    return ResNet(Basic, (2, 2, 2, 2), classes, small_images=small_images)


def ResNet50(classes: int = 1000, small_images: bool = False) -> ResNet:
    """The 50-layer residual network: 25,557,032 parameters at 1000 classes."""
    return ResNet(Bottleneck, (3, 4, 6, 3), classes, small_images=small_images)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):  # He 2015b, fan-out
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
