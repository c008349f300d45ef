"""What calibrate() runs: small layers, an optimiser, pieces of computation between messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

Pair = tuple[nn.Module, tuple[torch.Tensor, ...]]


def _linear(batch: int, inputs: int, outputs: int) -> Callable[[], Pair]:
    return lambda: (nn.Linear(inputs, outputs), (torch.randn(batch, inputs),))


def _conv(batch: int, channels: int, pixels: int) -> Callable[[], Pair]:
    make = nn.Conv2d(channels, channels, 3, padding=1)
    return lambda: (make, (torch.randn(batch, channels, pixels, pixels),))


class _Attention(nn.Module):
    """Causal attention of q, k, v without projections."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def _attention(batch: int, heads: int, length: int) -> Callable[[], Pair]:
    def make() -> Pair:
        q, k, v = (torch.randn(batch, heads, length, 32, requires_grad=True) for _ in range(3))
        return _Attention(), (q, k, v)

    return make


class _Scores(_Attention):
    """The same by single operators, scores written to memory: what ring attention works with."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
        return (scores - scores.logsumexp(dim=-1, keepdim=True)).exp() @ v


def _scores(batch: int, heads: int, length: int) -> Callable[[], Pair]:
    fused = _attention(batch, heads, length)
    return lambda: (_Scores(), fused()[1])


def _norm(batch: int, width: int) -> Callable[[], Pair]:
    return lambda: (nn.LayerNorm(width), (torch.randn(batch, width),))


def _embedding(batch: int, rows: int, width: int) -> Callable[[], Pair]:
    return lambda: (nn.Embedding(rows, width), (torch.arange(batch) % rows,))


LAYERS: Mapping[str, Callable[[], Pair]] = {
    "linear 1x16x16": _linear(1, 16, 16),
    "linear 64x256x256": _linear(64, 256, 256),
    "linear 256x512x512": _linear(256, 512, 512),
    "conv 4x16x16": _conv(4, 16, 16),
    "conv 16x32x16": _conv(16, 32, 16),
    "attention 2x4x32": _attention(2, 4, 32),
    "attention 4x4x128": _attention(4, 4, 128),
    "scores 2x4x32": _scores(2, 4, 32),
    "scores 4x4x128": _scores(4, 4, 128),
    "norm 64x256": _norm(64, 256),
    "norm 1024x512": _norm(1024, 512),
    "embedding 512x256x128": _embedding(512, 256, 128),
}


class LayerPart:
    """make() of a layer's forward, or forward and backward, on whatever device a rank has."""

    def __init__(self, name: str, backward: bool) -> None:
        self.name, self.backward = name, backward

    def __call__(self, mesh: Any) -> Callable[[], object]:
        module, inputs = LAYERS[self.name]()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        module, inputs = module.to(device), tuple(t.to(device) for t in inputs)
        for t in inputs:
            if t.is_floating_point():
                t.requires_grad_()
        if not self.backward:
            return lambda: module(*inputs)
        return lambda: module(*inputs).sum().backward()


class adam:
    """make() of an AdamW step over `count` parameters."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, mesh: Any) -> Callable[[], object]:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        parameter = nn.Parameter(torch.zeros(self.count, device=device))
        parameter.grad = torch.ones_like(parameter)
        return torch.optim.AdamW([parameter]).step


PIECES = 4  # in one sample
LONG, SHORT = 12, 1  # products in a piece: some milliseconds of a CPU's core, or a fraction of one


class piece:
    """piece(n)() makes a piece of computation such as stands between two messages of a step.

    Matrix products and element by element work over a few megabytes. A rank that comes from it has
    cold caches and a used-up slice of its core, a little earlier or later than the others.
    """

    def __init__(self, products: int = LONG) -> None:
        self.products = products

    def __call__(self) -> Callable[[], object]:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        rows, width = (8192, 1024) if device == "cuda" else (1024, 128)
        a, b = torch.randn(rows, width, device=device), torch.randn(width, width, device=device)
        kept = [torch.empty_like(a) for _ in range(self.products)]

        def compute() -> None:
            for out in kept:  # nothing is allocated: page faults would come and go with the heap
                torch.mm(a, b, out=out).tanh_()

        return compute


class pieces:
    """make() of PIECES pieces of computation alone."""

    def __init__(self, products: int = LONG) -> None:
        self.products = products

    def __call__(self, mesh: Any) -> Callable[[], object]:
        compute = piece(self.products)()

        def step() -> None:
            for _ in range(PIECES):
                compute()

        return step


IN_FLIGHT = 16


class handed_round:
    """make() of PIECES and then IN_FLIGHT broadcasts of `size_bytes`, the ranks' own in turn.

    So ZeroRedundancyOptimizer hands round the tensors that each rank updated.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes

    def __call__(self, mesh: Any) -> Callable[[], object]:
        group = mesh.get_group()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        sent = [torch.ones(max(1, self.size_bytes // 4), device=device) for _ in range(IN_FLIGHT)]
        roots = sorted(i % group.size() for i in range(IN_FLIGHT))
        compute = pieces()(mesh)

        def step() -> None:
            compute()
            works = [
                dist.broadcast(t, group_src=root, group=group, async_op=True)
                for t, root in zip(sent, roots, strict=True)
            ]
            for work in works:
                work.wait()  # moves S each

        return step


def ddp(mesh: Any) -> Callable[[], object]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = nn.Sequential(*[nn.Linear(512, 512) for _ in range(4)]).to(device)
    ddp = nn.parallel.DistributedDataParallel(net, process_group=mesh.get_group(), bucket_cap_mb=1)
    x = torch.randn(128, 512, device=device)
    return lambda: ddp(x).sum().backward()  # moves 2(n-1)/n of 4.2 MB
