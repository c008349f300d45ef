"""One rank's part of a model in one process: the shapes of its slices, nothing sent.

What cuts the layers' insides (heads and hidden features of tensor parallelism, the positions inside
attention of context parallelism) is done to a copy of the module, and what other ranks would send
is made up. Values mean nothing; what a backward pass keeps has the sizes that it has on a rank.

Shapes: B batch, T tokens (of this rank, or all), D features, H heads, t or c ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from pardemo.strategies import batchnorm, expert, routing, tensor_attention, tensor_plans
from pardemo.strategies.pipeline_split import Chain
from pardemo.strategies.ring_attention import RingAttention, chunks_of


def cut_layers(module: nn.Module, ranks: int, sequence_parallel: bool = False) -> None:
    """Leave 1/ranks of every pair of `module`, in place; `sequence_parallel`: of tokens too."""
    body = nn.Sequential(*module.parts) if isinstance(module, Chain) else module
    found = tensor_plans.pairs(body)
    for pair in found:
        for name in pair.columns:
            column = body.get_submodule(name)
            for own, _ in list(column.named_parameters(recurse=False)):
                _narrow(column, own, 0, ranks)
        if pair.attention:
            _cut_heads(body.get_submodule(pair.attention), ranks)
        _narrow(body.get_submodule(pair.rows), "weight", 1, ranks)
    if sequence_parallel:
        _cut_tokens(body, found, ranks)


def _narrow(module: nn.Module, name: str, dim: int, ranks: int) -> None:
    """Replace a parameter by its first 1/ranks along `dim`."""
    old = getattr(module, name)
    mine = old.detach().narrow(dim, 0, old.shape[dim] // ranks).clone()
    setattr(module, name, nn.Parameter(mine, requires_grad=old.requires_grad))


def _cut_heads(module: Any, ranks: int) -> None:
    """nn.MultiheadAttention with 1/ranks of its heads; see tensor_attention.split."""
    for name in tensor_attention.FUSED:
        if getattr(module, name) is not None:
            _narrow(module, name, 0, ranks)
    module._qkv_same_embed_dim = False
    module.forward = functools.partial(_heads, module)


def _heads(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, need_weights: bool = True,
    **__: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What the heads of one rank keep, masks aside: (B, L, D) or (L, B, D), as batch_first says."""
    turned, biases = not module.batch_first, module.in_proj_bias
    weights = module.in_proj_weight.chunk(3)
    added = [None] * 3 if biases is None else biases.chunk(3)
    q, k, v = (
        F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, added, strict=True)
    )
    if turned and query.dim() == 3:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    q, k, v = (x.unflatten(-1, (-1, module.head_dim)).transpose(-3, -2) for x in (q, k, v))
    out, scores = tensor_attention.attend(q, k, v, None, 0.0, need_weights)
    out = out.transpose(-3, -2).flatten(-2)
    if turned and query.dim() == 3:
        out = out.transpose(0, 1)
    return module.out_proj(out), None if scores is None else scores.mean(-3)


def _cut_tokens(model: Any, found: list[tensor_plans.Pair], ranks: int) -> None:
    """Norms and residuals on T/t tokens, gathered before every pair's module and the head."""

    def part(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return out[:, : out.shape[1] // ranks].contiguous()

    def gathered(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (torch.cat([args[0]] * ranks, dim=1), *args[1:])

    model.embed.register_forward_hook(part)
    model.head.register_forward_pre_hook(gathered)
    for pair in found:
        owner = model.get_submodule(pair.rows.rpartition(".")[0])
        owner.register_forward_pre_hook(gathered)
        model.get_submodule(pair.rows).register_forward_hook(part)


class LoneRing(RingAttention):
    """Ring attention of `rank` with nobody beside it: what would arrive is what would be sent."""

    def __init__(self, rank: int, ranks: int, balance: str) -> None:
        self.causal, self.balance, self.blocks = True, balance, 0
        self.rank, self.world_size = rank, ranks
        self.chunks = [chunks_of(r, ranks, balance) for r in range(ranks)]

    def shift(self, outgoing: Tensor) -> tuple[Tensor, list[Any]]:
        """A tensor of the size of what would come from the rank before."""
        return outgoing.clone(), []


class LoneExperts(routing.SendToExperts):
    """The experts of `rank` with nobody beside it: as much arrives as is sent, of its own rows."""

    def __init__(self, rank: int, here: Any, owned: list[range]) -> None:
        self.rank, self.size, self.here, self.owned = rank, len(owned), here, owned
        self.away_rows = self.guest_rows = 0

    def meet(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """As if every rank's tokens chose like this one's."""
        return counts * self.rank, counts * self.size

    def swap(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Its own rows, as often as it takes to be as many as would arrive."""
        wanted = sum(received)
        return torch.cat([rows] * -(-wanted // max(1, len(rows))))[:wanted]


def keep_experts(module: nn.Module, rank: int, ranks: int) -> None:
    """Leave `module`, in place, the experts of `rank`, and nobody to send others' rows to."""
    for layer in routing.seams(module):
        owned = expert.share(len(layer.experts), ranks)
        names = list(layer.experts)
        layer.experts = nn.ModuleDict({names[e]: layer.experts[names[e]] for e in owned[rank]})
        layer.exchange = LoneExperts(rank, layer.exchange, owned)


def lone_ulysses(ranks: int) -> Callable[..., Tensor]:
    """Attention (B, H, T/c, D) that trades positions for heads with nobody: (B, H/c, T, D)."""

    def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        q, k, v = (torch.cat(x.chunk(ranks, dim=1), dim=2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return torch.cat(out.chunk(ranks, dim=2), dim=1)

    return attend


def meet_alone(module: nn.Module) -> None:
    """Give `module`, in place, the BatchNorm of replicas in threads, with one replica to meet.

    Autograd tracks its statistics across replicas, for which it keeps more than nn.BatchNorm does.
    """
    meeting = batchnorm.Meeting()
    batchnorm.replace(module, lambda old: batchnorm.ThreadBatchNorm(old, meeting))


def count_alone(module: nn.Module) -> None:
    """Give `module`, in place, the BatchNorm of ranks on CPUs, with nobody to add statistics up."""
    batchnorm.replace(module, lambda old: batchnorm.RankBatchNorm(old, lambda sums: sums))


def cut_positions(module: nn.Module, where: Tensor, rank: int, ranks: int, method: str,
                  balance: str) -> None:  # fmt: skip
    """Let `module`, in place, attend as `rank` of `ranks` does, its tokens standing at `where`."""
    ring = LoneRing(rank, ranks, balance) if method == "ring" else lone_ulysses(ranks)
    seams: list[Any] = list(module.modules())
    for layer in seams:
        if hasattr(layer, "attend"):
            layer.attend = ring
        if hasattr(layer, "positions"):
            layer.positions = where
