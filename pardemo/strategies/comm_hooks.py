"""DDP communication hooks: what is sent in place of a bucket of gradients.

DDP calls a hook with each full bucket while the backward pass goes on. It must return a Future of
the bucket averaged over ranks. Two of torch's own do not work everywhere: its bf16 hook wants NCCL,
its PowerSGD hook issues collectives from several threads and deadlocks on gloo with two buckets.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

Group = dist.ProcessGroup | None


def done(tensor: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    """A Future that already holds its value."""
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(tensor)
    return future


def noop(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Send nothing: ranks drift apart. For measuring what communication costs, never to train."""
    return done(bucket.buffer())


def bf16(state: Group, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average in bfloat16: half the bytes of float32, 8 bits of mantissa."""
    whole = bucket.buffer()
    small = whole.to(torch.bfloat16).div_(dist.get_world_size(state))
    work = dist.all_reduce(small, group=state, async_op=True)  # moves 2(n-1)/n * 2 bytes per value
    return work.get_future().then(lambda future: whole.copy_(future.value()[0]))


def fp16(state: Group, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average in float16: half the bytes of float32; values beyond 65504 overflow."""
    return default_hooks.fp16_compress_hook(state, bucket)  # type: ignore[arg-type]


class PowerSGD:
    """Low-rank gradients with error feedback (Vogels 2019, algorithm 1); one state per model.

    A gradient matrix (a, b) is sent as (a, rank) and (b, rank). What was lost is kept, per
    parameter, and added to the next gradient. Vectors, and matrices that would not get smaller, are
    averaged whole. The collectives run one after another in the hook itself, in the same order on
    every rank, which is what makes any number of buckets safe on gloo.
    """

    def __init__(self, group: Group, rank: int = 4, seed: int = 0) -> None:
        self.group, self.rank = group, rank
        self.generator = torch.Generator().manual_seed(seed)  # the same start on every rank
        self.q: dict[int, torch.Tensor] = {}
        self.error: dict[int, torch.Tensor] = {}

    def __call__(self, state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        grads = list(zip(bucket.parameters(), bucket.gradients(), strict=True))
        matrices = [(id(p), g) for p, g in grads if self.pays(g)]
        whole = [g for p, g in grads if not self.pays(g)]
        if whole:
            self.average(whole)
        if matrices:
            self.compress(matrices)
        return done(bucket.buffer())

    def pays(self, grad: torch.Tensor) -> bool:
        """Whether the two factors are smaller than the matrix."""
        if grad.dim() < 2:
            return False
        a, b = grad.shape[0], grad[0].numel()
        return (a + b) * self.rank < a * b

    def compress(self, matrices: list[tuple[int, torch.Tensor]]) -> None:
        """Replace each gradient by its average's low-rank approximation, in place."""
        work = []
        for key, grad in matrices:
            if key not in self.q:
                shape = (grad[0].numel(), self.rank)
                start = torch.randn(shape, generator=self.generator)
                self.q[key] = start.to(grad.device, grad.dtype)
                self.error[key] = torch.zeros_like(grad)
            work.append((key, grad, (grad + self.error[key]).flatten(1)))
        ps = [matrix @ self.q[key] for key, _, matrix in work]
        self.average(ps)
        ps = [torch.linalg.qr(p.float() if p.dtype.itemsize < 4 else p)[0].to(p.dtype) for p in ps]
        qs = [matrix.t() @ p for (_, _, matrix), p in zip(work, ps, strict=True)]
        self.average(qs)
        for (key, grad, matrix), p, q in zip(work, ps, qs, strict=True):
            approximation = p @ q.t()
            self.error[key].copy_((matrix - approximation).view_as(grad))
            self.q[key] = q
            grad.copy_(approximation.view_as(grad))

    def average(self, tensors: list[torch.Tensor]) -> None:
        """The mean over ranks of several tensors, in place, with one collective."""
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat, group=self.group)  # moves 2(n-1)/n * bytes of all of them
        flat /= dist.get_world_size(self.group)
        parts = flat.split([t.numel() for t in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


NAMES = ("fp16", "bf16", "powersgd", "noop")


def register(ddp: Any, name: str, group: Group, rank: int = 4) -> None:
    """Register the hook called `name` on a DDP module."""
    hook = (
        PowerSGD(group, rank)
        if name == "powersgd"
        else {"fp16": fp16, "bf16": bf16}.get(name, noop)
    )
    # DDP refuses annotations that are strings, as postponed ones are; a lambda has none
    ddp.register_comm_hook(group, lambda state, bucket: hook(state, bucket))
