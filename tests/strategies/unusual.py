"""Small models with what real ones have: ties, frozen and shared layers, buffers, odd shapes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from pardemo import data, strategies
from pardemo.models import GPT, MLP, GPTConfig
from pardemo.models.resnet import Basic, ResNet
from pardemo.strategies import Step
from pardemo.workloads import Workload, sgd, workload

TOKENS = GPTConfig(vocab_size=256, block_size=16, n_layer=3, n_head=4, n_embd=32)


def seeded(make: Any, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def trainer(name: str, work: Workload, seed: int = 0, **knobs: Any) -> Step:
    """The strategy called `name` at work on this rank, over a mesh of all ranks."""
    row = strategies.get(name)
    return row.build(work.make_model(seed), work.make_optimizer, work.loss, row.mesh(), **knobs)


def mini_gpt(config: GPTConfig = TOKENS) -> Workload:
    """A GPT with tied embeddings that trains in milliseconds."""
    work = workload("gpt-mini", batch_size=8)
    return replace(
        work,
        make_model=partial(seeded, partial(GPT, config)),
        make_batch=lambda size, step, seed: data.windows(size, config.block_size, step, seed),
    )


def frozen_gpt() -> Workload:
    """The tied GPT with a frozen first block and a frozen position embedding."""

    def make() -> nn.Module:
        model = GPT(TOKENS)
        model.blocks[0].requires_grad_(False)
        model.embed.pos.requires_grad_(False)
        return model

    return replace(mini_gpt(), make_model=partial(seeded, make))


class SharedBlocks(ResNet):
    """A ResNet that runs its second block twice."""

    def sequence(self) -> list[tuple[str, nn.Module]]:
        pieces = super().sequence()
        return [*pieces[:3], pieces[2], *pieces[3:]]


def shared_resnet() -> Workload:
    make = partial(SharedBlocks, Basic, (2, 1), 10, 1, width=4, small_images=True)
    return replace(workload("resnet-mini", batch_size=8), make_model=partial(seeded, make))


class Offset(nn.Module):
    """Adds a constant buffer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.randn(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.value


class SharedLinear(nn.Module):
    """Linear layers of which the second and the fourth are one; buffers, one of them unused."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(64, 32), nn.Linear(32, 32)
        self.other, self.last = nn.Linear(32, 32), nn.Linear(32, 10)
        self.offset = Offset(32)
        self.register_buffer("unused", torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _, piece in self.sequence():
            x = piece(x)
        return x

    def sequence(self) -> list[tuple[str, nn.Module]]:
        order = [("first", self.first), ("middle", self.middle), ("offset", self.offset)]
        return [*order, ("other", self.other), ("middle", self.middle), ("last", self.last)]


def shared_linear() -> Workload:
    work = workload("mlp", batch_size=8)
    return replace(work, make_model=partial(seeded, SharedLinear))


class Plain(nn.Module):
    """A plain nn.Transformer between an embedding and a head: two inputs, no sequence()."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.core = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 20)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.head(self.core(self.embed(source), self.embed(target)))


def plain_transformer() -> Workload:
    def make_batch(size: int, step: int, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed * 1000 + step)
        source = torch.randint(20, (size, 7), generator=generator)
        return (source, source.flip(1)), source

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output.flatten(0, 1), target.flatten())

    return Workload("transformer", partial(seeded, Plain), make_batch, loss, sgd, 8)


def branching() -> Workload:
    """A model of which one branch gets no gradient at odd steps."""

    class Branching(MLP):
        def __init__(self) -> None:
            super().__init__((64, 16, 10))
            self.extra = nn.Linear(10, 10)
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            x = super().forward(x)
            return self.extra(x) if self.calls % 2 else x

    return replace(workload("mlp", batch_size=8), make_model=partial(seeded, Branching))
