"""BatchNorm over the batch of all ranks, so that splitting a batch does not change the model.

nn.BatchNorm normalises with the mean and variance of the samples it sees. Under data parallelism
each rank sees a part, so the same network computes something else. Here ranks add up their counts,
sums and sums of squares first: an all-reduce of 2C+1 doubles forward and of 2C values backward per
layer of C channels. On GPUs torch's own nn.SyncBatchNorm is used; it refuses CPU tensors, hence
this one. The normalisation is Ioffe 2015, algorithm 1, over the whole batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

# Adds a vector over all parts of the batch, in place, and returns it.
AddUp = Callable[[torch.Tensor], torch.Tensor]


def has_batchnorm(module: nn.Module) -> bool:
    """Whether some layer normalises over the batch."""
    return any(isinstance(m, _BatchNorm) for m in module.modules())


def synchronise(
    module: nn.Module, group: dist.ProcessGroup | None, device: torch.device
) -> nn.Module:
    """Replace every BatchNorm inside `module` by one over all of `group`; keys stay the same.

    Parameters and buffers are the same objects as before. Nothing happens at degree 1.
    """
    if group is None or not has_batchnorm(module):
        return module
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module, group)

    def add_up(vector: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(vector, group=group)  # moves 2(n-1)/n * its bytes
        return vector

    return replace(module, lambda old: RankBatchNorm(old, add_up))


def replace(module: nn.Module, make: Callable[[_BatchNorm], nn.Module]) -> nn.Module:
    """Replace every BatchNorm inside `module` by `make(it)`; a shared one stays shared."""
    made: dict[nn.Module, nn.Module] = {}
    if isinstance(module, _BatchNorm):
        return make(module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm):
                made.setdefault(child, make(child))
                setattr(parent, name, made[child])
    return module


class GlobalBatchNorm(_BatchNorm):
    """BatchNorm over all parts of a batch; a subclass says how parts meet in `normalise`.

    Takes over the parameters and buffers of `old`. Input (n, C, ...); n may differ between parts.
    """

    def __init__(self, old: _BatchNorm) -> None:
        super().__init__(old.num_features, old.eps, old.momentum, affine=False)
        self.affine, self.track_running_stats = old.affine, old.track_running_stats
        self._parameters, self._buffers = old._parameters, old._buffers
        self.training = old.training

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"BatchNorm needs (n, C, ...), got shape {tuple(input.shape)}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise over all parts while training; with the running statistics otherwise."""
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        self._check_input_dim(input)
        out, mean, var, count = self.normalise(input)
        if self.training and self.running_mean is not None:
            self.remember(mean, var, count)
        return out

    def normalise(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The output, and the mean (C,), biased variance (C,) and count (1,) over all parts."""
        raise NotImplementedError

    @torch.no_grad()
    def remember(self, mean: torch.Tensor, var: torch.Tensor, count: torch.Tensor) -> None:
        """Move the running statistics towards this batch's (variance unbiased, as torch's)."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        rate = self.momentum
        if rate is None:
            rate = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
        unbiased = var * (count / (count - 1).clamp(min=1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), rate)


class RankBatchNorm(GlobalBatchNorm):
    """Parts on ranks: `add_up` is an all-reduce, forward and backward."""

    def __init__(self, old: _BatchNorm, add_up: AddUp) -> None:
        super().__init__(old)
        self.add_up = add_up

    def normalise(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """By the autograd Function below, which adds up in both directions."""
        return _Normalise.apply(x, self.weight, self.bias, self.eps, self.add_up)


class Meeting:
    """Where the replicas of one process, a thread each, exchange tensors."""

    def __init__(self) -> None:
        self.open(1)

    def open(self, parties: int) -> None:
        """Expect this many threads."""
        self.barrier = threading.Barrier(parties, timeout=60)
        self.brought: list[torch.Tensor] = []

    def add_up(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of what all threads bring; autograd sees where each term came from."""
        self.brought.append(value)
        self.barrier.wait()
        terms = sorted(self.brought, key=id)  # one order for all threads, whoever came first
        total = torch.stack([term.to(value.device) for term in terms]).sum(0)
        if self.barrier.wait() == 0:
            self.brought.clear()
        self.barrier.wait()
        return total

    def abort(self) -> None:
        """Release everybody who waits, with an error."""
        self.barrier.abort()


class ThreadBatchNorm(GlobalBatchNorm):
    """Parts in threads of one process: autograd tracks the sums, in one graph over all parts."""

    def __init__(self, old: _BatchNorm, meeting: Meeting) -> None:
        super().__init__(old)
        self.meeting = meeting

    def normalise(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Two meetings: for the mean, then for the variance around it."""
        over = [dim for dim in range(x.dim()) if dim != 1]
        count = x.new_full((1,), x.numel() / x.shape[1])
        sums = self.meeting.add_up(torch.cat([x.sum(over), count]))
        mean, count = sums[:-1] / sums[-1], sums[-1:].detach()
        centred = x - _wide(mean, x)
        var = self.meeting.add_up(centred.square().sum(over)) / count
        out = centred * _wide((var + self.eps).rsqrt(), x)
        if self.weight is not None:
            out = out * _wide(self.weight, x)
        if self.bias is not None:
            out = out + _wide(self.bias, x)
        return out, mean, var, count


class _Normalise(torch.autograd.Function):
    """Forward: (x - mean) / std * weight + bias; returns also mean, variance and count."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
        eps: float, add_up: AddUp,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        mean, var, count = global_statistics(x, add_up)
        inverse = (var + eps).rsqrt()
        normal = (x - _wide(mean, x)) * _wide(inverse, x)
        ctx.save_for_backward(normal, weight, inverse, count)
        ctx.add_up, ctx.has_bias = add_up, bias is not None
        out = normal if weight is None else normal * _wide(weight, x)
        out = out if bias is None else out + _wide(bias, x)
        ctx.mark_non_differentiable(mean, var, count)
        return out, mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        normal, weight, inverse, count = ctx.saved_tensors
        over = [dim for dim in range(grad.dim()) if dim != 1]
        sums = torch.cat([grad.sum(over), (grad * normal).sum(over)])
        here = sums.clone()  # this part's own share: the gradients of bias and weight
        sum_grad, sum_grad_normal = (ctx.add_up(sums) / count).chunk(2)
        scale = inverse if weight is None else inverse * weight
        back = grad - _wide(sum_grad, grad) - normal * _wide(sum_grad_normal, grad)
        grad_bias, grad_weight = here.chunk(2)
        return (
            back * _wide(scale, grad),
            None if weight is None else grad_weight,
            grad_bias if ctx.has_bias else None,
            None,
            None,
        )


def global_statistics(
    x: torch.Tensor, add_up: AddUp
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean (C,), biased variance (C,) and count (1,) over all parts, by one sum over parts.

    The sums are doubles, so that the mean of squares minus the square of the mean loses nothing
    that float32 would keep.
    """
    over = [dim for dim in range(x.dim()) if dim != 1]
    wide = x.double()
    count = wide.new_full((1,), x.numel() / x.shape[1])
    sums = add_up(torch.cat([wide.sum(over), wide.square().sum(over), count]))
    channels = x.shape[1]
    count = sums[-1:]
    mean = sums[:channels] / count
    var = (sums[channels:-1] / count - mean.square()).clamp(min=0)
    return mean.to(x.dtype), var.to(x.dtype), count.to(x.dtype)


def _wide(vector: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return vector.view(1, -1, *([1] * (like.dim() - 2)))
