"""Ulysses: an all-to-all trades positions for heads around an ordinary attention.

Split      the sequence outside attention (rank r holds T/c positions, all heads), the heads
           inside it (all T positions, H/c heads).
Sent       one all-to-all each for Q, K, V and the result forward, the same four backward. With A =
           bytes of one of them over the whole sequence, a rank sends 4 (c-1)/c * A/c each way:
           c times less than ring attention's K and V when c is large, but H must divide by c.
Memory     scores of T x T for H/c heads; nothing else is larger than without attention.
Paper      Jacobs et al. 2023, "DeepSpeed Ulysses".

Shapes: B batch, H heads, T positions of this rank, D size of a head, c ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pardemo.strategies.cut import StrategyError


class _Exchange(torch.autograd.Function):
    """Cut dim `cut` among the ranks and join what they send along dim `join`; backward swaps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, cut: int, join: int) -> Tensor:
        ctx.group, ctx.cut, ctx.join = group, cut, join
        return _exchange(x, group, cut, join)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grads[0], ctx.group, ctx.join, ctx.cut), None, None, None


def _exchange(x: Tensor, group: dist.ProcessGroup, cut: int, join: int) -> Tensor:
    world_size = dist.get_world_size(group)
    outgoing = torch.stack(x.chunk(world_size, dim=cut))
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing, group=group)  # moves (c-1)/c of the bytes of x
    return torch.cat(incoming.unbind(0), dim=join)


class UlyssesAttention:
    """Attention over a sequence that is spread over the ranks of `group`; call it with q, k, v.

    It replaces `scaled_dot_product_attention(q, k, v, is_causal=causal)`: shapes (B, H, T, D) of
    this rank's positions, which must be contiguous. `attend` is what runs on the whole sequence.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        causal: bool = True,
        attend: Callable[..., Tensor] = F.scaled_dot_product_attention,
    ) -> None:
        self.group, self.causal, self.attend = group, causal, attend

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        heads, ranks = q.shape[1], dist.get_world_size(self.group)
        if heads % ranks:
            raise StrategyError(
                f"Ulysses spreads {heads} heads over {ranks} ranks, which does not divide: use "
                "method='ring', or as many ranks as divide the heads"
            )
        q, k, v = (_Exchange.apply(x, self.group, 1, 2) for x in (q, k, v))  # heads out, time in
        out = self.attend(q, k, v, dropout_p=dropout, is_causal=self.causal)
        return _Exchange.apply(out, self.group, 2, 1)  # time out, heads in
