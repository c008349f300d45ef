"""nn.MultiheadAttention by heads: its fused query, key and value weight cut over ranks, in place.

The rows of `in_proj_weight` are all queries, then all keys, then all values, so a plain cut would
give one rank the queries and another the values. Here rows are first put in the order (feature,
query-key-value): every rank's consecutive share is then whole heads of all three. The optimiser
sees tensors of the same number of dims; `unfused` restores the original order.

Shapes: B batch, L queries, S keys, D features, H heads of all ranks, h heads of this rank.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

FUSED = ("in_proj_weight", "in_proj_bias")


def splits(module: nn.MultiheadAttention) -> bool:
    """Whether it has one weight for queries, keys and values, and nothing added to the keys."""
    plain = module.bias_k is None and module.bias_v is None and not module.add_zero_attn
    return bool(module._qkv_same_embed_dim) and plain


def fused(tensor: torch.Tensor) -> torch.Tensor:
    """Rows (query-key-value, feature) in the order (feature, query-key-value)."""
    return tensor.unflatten(0, (3, -1)).transpose(0, 1).flatten(0, 1)


def unfused(tensor: torch.Tensor) -> torch.Tensor:
    """The inverse of `fused`."""
    return tensor.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)


@torch.no_grad()
def split(module: nn.MultiheadAttention, mesh: DeviceMesh) -> None:
    """Keep this rank's heads of `module`; its `out_proj` must be split by rows as well."""
    for name in FUSED:
        old = getattr(module, name)
        if old is not None:
            mine = fused(old).chunk(mesh.size())[mesh.get_local_rank()].clone()
            whole = DTensor.from_local(mine, mesh, [Shard(0)], run_check=False)
            setattr(module, name, nn.Parameter(whole, requires_grad=old.requires_grad))
    module.reordered = FUSED  # type: ignore[assignment] # parts.read and parts.write look here
    module._qkv_same_embed_dim = False  # torch's fused inference kernels must not see the slices
    module.forward = functools.partial(_forward, module, mesh)  # type: ignore[method-assign]


def _forward(
    module: nn.MultiheadAttention, mesh: DeviceMesh, query: torch.Tensor, key: torch.Tensor,
    value: torch.Tensor, key_padding_mask: torch.Tensor | None = None, need_weights: bool = True,
    attn_mask: torch.Tensor | None = None, average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """As nn.MultiheadAttention.forward, with this rank's heads; `is_causal` is only a hint."""
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    single, turned = query.dim() == 2, not module.batch_first
    made: dict[int, torch.Tensor] = {}  # one sum of gradients for tensors given twice
    for x in (query, key, value):
        if id(x) not in made:
            made[id(x)] = _same_for_all(x, mesh)
    q, k, v = (_project(module, made[id(x)], i) for i, x in enumerate((query, key, value)))
    if single:
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif turned:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    size = module.head_dim
    q, k, v = (x.unflatten(-1, (-1, size)).transpose(1, 2) for x in (q, k, v))  # (B, h, L, size)
    mask = _masks(attn_mask, key_padding_mask, q, module.num_heads, mesh)
    out, weights = attend(q, k, v, mask, module.dropout if module.training else 0.0, need_weights)
    out = out.transpose(1, 2).flatten(2)
    out = out.squeeze(0) if single else out.transpose(0, 1) if turned else out
    out = module.out_proj(out)  # moves 2(t-1)/t * bytes of the result
    if weights is None:
        return out, None
    weights = _everybodys(weights, mesh, average_attn_weights, module.num_heads)
    return out, weights.squeeze(0) if single else weights


def _same_for_all(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """`x`, whose gradient is summed over the ranks (Megatron's f): 2(t-1)/t * its bytes."""
    whole = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return whole.to_local(grad_placements=[Partial()])


def _project(module: nn.MultiheadAttention, x: torch.Tensor, which: int) -> torch.Tensor:
    """Queries (0), keys (1) or values (2) of this rank's heads."""
    weight, bias = (
        p.to_local()[which::3] if isinstance(p, DTensor) else None
        for p in (module.in_proj_weight, module.in_proj_bias)
    )
    assert weight is not None
    return F.linear(x, weight, bias)


def _masks(
    attn: torch.Tensor | None, padding: torch.Tensor | None, q: torch.Tensor, heads: int,
    mesh: DeviceMesh,
) -> torch.Tensor | None:  # fmt: skip
    """Both masks as numbers to add to the scores (B or 1, h or 1, L or 1, S); None for none."""
    found = []
    if attn is not None and attn.dim() == 3:  # (B * H, L, S): every head has its own
        mine = q.shape[1]
        start = mesh.get_local_rank() * mine
        found.append(attn.unflatten(0, (-1, heads))[:, start : start + mine])
    elif attn is not None:
        found.append(attn[None, None])
    if padding is not None:
        found.append(padding[:, None, None, :])
    added = [
        torch.zeros_like(m, dtype=q.dtype).masked_fill_(m, -math.inf) if m.dtype == torch.bool
        else m.to(q.dtype)
        for m in found
    ]  # fmt: skip
    return sum(added[1:], added[0]) if added else None


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout: float,
    need_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """(B, h, L, size), and the weights (B, h, L, S) where they are wanted."""
    if not need_weights:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return out, None
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
    return weights @ v, weights


def _everybodys(weights: torch.Tensor, mesh: DeviceMesh, average: bool, heads: int) -> torch.Tensor:
    """The mean over all heads, or all of them, from the heads of every rank."""
    if average:
        part: Any = DTensor.from_local(weights.sum(1) / heads, mesh, [Partial()], run_check=False)
    else:
        part = DTensor.from_local(weights, mesh, [Shard(1)], run_check=False)
    return part.redistribute(placements=[Replicate()]).to_local()  # moves the weights
