"""Ring attention: every rank keeps its queries and the keys and values travel round a ring.

Split      the sequence: rank r holds T/c positions of Q, K and V, for all heads.
Sent       forward: K and V of T/c positions, c - 1 times. Backward: K and V again, c - 1 times,
           and the gradients of K and V, c - 1 times. With KV = bytes of the whole K and V of one
           layer, a rank sends (c-1)/c * KV forward and 2 (c-1)/c * KV backward.
Memory     scores of T/c x T/c instead of T x T; two blocks of K and V instead of all of them.
Paper      Liu et al. 2023, "Ring Attention with Blockwise Transformers"; the merge of partial
           results is FlashAttention's (Dao 2022), the zig-zag order is from Brandon et al. 2023,
           "Striped Attention", in the variant that Llama 3 used (section 3.3.2).

Shapes: B batch, H heads, T positions of this rank, S positions of one chunk, D size of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pardemo.strategies.cut import StrategyError


def chunks_of(rank: int, world_size: int, balance: str) -> list[int]:
    """The chunks of the sequence that a rank holds, in order.

    "contiguous" cuts the sequence in c chunks, one each. "zigzag" cuts it in 2c and gives rank r
    the chunks r and 2c-1-r: an early and a late one, so that all ranks see as many keys.
    """
    if balance == "contiguous":
        return [rank]
    if balance == "zigzag":
        return [rank, 2 * world_size - 1 - rank]
    raise StrategyError(f'balance is "contiguous" or "zigzag", not {balance!r}')


def positions_of(rank: int, world_size: int, length: int, balance: str) -> Tensor:
    """The positions (int64) of a sequence of `length` that a rank holds, in its own order."""
    count = world_size * len(chunks_of(rank, world_size, balance))
    size = length // count
    starts = [chunk * size for chunk in chunks_of(rank, world_size, balance)]
    return torch.cat([torch.arange(start, start + size) for start in starts])


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, from the attention over each.

    `lse` is the logarithm of the sum of the exponentials of a query's scores: the weight that a
    partial result deserves. Weights of the parts are exp(lse_a - lse) and exp(lse_b - lse).
    Shapes: out (..., S, D), lse (..., S).
    """
    lse = torch.logaddexp(lse_a, lse_b)
    out = out_a * (lse_a - lse).exp().unsqueeze(-1) + out_b * (lse_b - lse).exp().unsqueeze(-1)
    return out, lse


class RingAttention:
    """Attention over a sequence that is spread over the ranks of `group`; call it with q, k, v.

    It replaces `scaled_dot_product_attention(q, k, v, is_causal=causal)`: shapes (B, H, T, D) of
    this rank's positions, in the order of `positions_of`. `blocks` counts the products of two
    chunks that this rank computed in forward passes: the measure of balance.
    """

    def __init__(
        self, group: dist.ProcessGroup, causal: bool = True, balance: str = "contiguous"
    ) -> None:
        self.group, self.causal, self.balance = group, causal, balance
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.chunks = [chunks_of(r, self.world_size, balance) for r in range(self.world_size)]
        self.blocks = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        if dropout:
            raise StrategyError(
                f"ring attention has no dropout inside attention, got {dropout}: build the model "
                "with dropout=0.0 or use method='ulysses'"
            )
        return _Ring.apply(q, k, v, self)

    def pairs(self, owner: int) -> Iterator[tuple[int, int, bool]]:
        """(query chunk, key chunk, needs the triangular mask) for keys that `owner` holds.

        Chunks are counted within a rank. Pairs whose keys all lie in the future are left out.
        """
        for i, mine in enumerate(self.chunks[self.rank]):
            for j, theirs in enumerate(self.chunks[owner]):
                if not self.causal or theirs < mine:
                    yield i, j, False
                elif theirs == mine:
                    yield i, j, True

    def shift(self, outgoing: Tensor) -> tuple[Tensor, list[dist.Work]]:
        """Start sending a tensor to the next rank; returns what arrives from the previous one."""
        incoming = torch.empty_like(outgoing)
        peers = [(self.rank + 1) % self.world_size, (self.rank - 1) % self.world_size]
        after, before = (dist.get_global_rank(self.group, peer) for peer in peers)
        operations = [
            dist.P2POp(dist.isend, outgoing, after, self.group),  # moves the bytes of `outgoing`
            dist.P2POp(dist.irecv, incoming, before, self.group),
        ]
        return incoming, dist.batch_isend_irecv(operations)

    def visits(self, k: Tensor, v: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(owner, its k, its v) for every rank in ring order, starting with this one.

        The next block is under way while the caller works on this one.
        """
        block = torch.stack([k, v])
        for step in range(self.world_size):
            last = step == self.world_size - 1
            if not last:
                incoming, under_way = self.shift(block)
            yield (self.rank - step) % self.world_size, block[0], block[1]
            if not last:
                for work in under_way:
                    work.wait()
                block = incoming


def _wide(x: Tensor) -> Tensor:
    """In float32 at least: sums over the whole sequence are kept there."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scores(q: Tensor, k: Tensor, masked: bool) -> Tensor:
    """Scaled products of queries and keys (..., S, S), future keys at minus infinity."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if masked:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores


class _Ring(torch.autograd.Function):
    """Forward keeps q, k, v, the result and its log-sum-exp; backward recomputes the scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: RingAttention) -> Tensor:
        parts = len(ring.chunks[ring.rank])
        qs = q.chunk(parts, dim=2)
        found: list[tuple[Tensor, Tensor] | None] = [None] * parts
        for owner, their_k, their_v in ring.visits(k, v):
            ks, vs = their_k.chunk(parts, dim=2), their_v.chunk(parts, dim=2)
            for i, j, masked in ring.pairs(owner):
                scores = _wide(_scores(qs[i], ks[j], masked))
                lse = scores.logsumexp(dim=-1)
                out = (scores - lse.unsqueeze(-1)).exp() @ _wide(vs[j])
                seen = found[i]
                found[i] = (out, lse) if seen is None else merge(*seen, out, lse)
                ring.blocks += 1
        pairs = [pair for pair in found if pair is not None]
        out = torch.cat([pair[0] for pair in pairs], dim=2).to(q.dtype)
        lse = torch.cat([pair[1] for pair in pairs], dim=2)
        ctx.ring = ring
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        ring: RingAttention = ctx.ring
        q, k, v, out, lse = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_q = torch.zeros_like(_wide(q))
        delta = (grad * out).sum(dim=-1)  # the softmax's part of the gradient, one number per query
        home: Tensor | None = None
        travelling: Tensor | None = None
        under_way: list[dist.Work] = []
        for owner, their_k, their_v in ring.visits(k, v):
            ours = _block_backward(ring, owner, (q, their_k, their_v, lse, grad, delta), grad_q)
            if owner == ring.rank:
                home = ours  # stays here until the sum over the other ranks has come round
                continue
            for work in under_way:
                work.wait()
            travelling = ours if travelling is None else travelling.add_(ours)
            travelling, under_way = ring.shift(travelling)
        for work in under_way:
            work.wait()
        assert home is not None
        grad_kv = home if travelling is None else home + travelling
        return grad_q.to(q.dtype), grad_kv[0].to(k.dtype), grad_kv[1].to(v.dtype), None


def _block_backward(
    ring: RingAttention, owner: int, tensors: tuple[Tensor, ...], grad_q: Tensor
) -> Tensor:
    """Gradients of `owner`'s K and V (2, B, H, T, D) by this rank's queries; adds to `grad_q`."""
    parts = len(ring.chunks[ring.rank])
    q, k, v, lse, grad, delta = (tensor.chunk(parts, dim=2) for tensor in tensors)
    grad_kv = torch.zeros_like(_wide(torch.stack(tensors[1:3])))
    into_q, into_k, into_v = (g.chunk(parts, dim=2) for g in (grad_q, grad_kv[0], grad_kv[1]))
    scale = 1 / math.sqrt(q[0].shape[-1])
    for i, j, masked in ring.pairs(owner):
        weights = (_wide(_scores(q[i], k[j], masked)) - lse[i].unsqueeze(-1)).exp()
        into_v[j].add_(weights.transpose(-1, -2) @ _wide(grad[i]))
        by_scores = weights * (_wide(grad[i]) @ _wide(v[j]).transpose(-1, -2) - delta[i][..., None])
        into_q[i].add_(by_scores @ _wide(k[j]), alpha=scale)
        into_k[j].add_(by_scores.transpose(-1, -2) @ _wide(q[i]), alpha=scale)
    return grad_kv
