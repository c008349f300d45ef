"""Context parallelism: one long sequence is split over the ranks, the model is on all of them.

Split      every sample's tokens: rank r holds T/c of the T positions ("contiguous"), or an early
           and a late piece of T/2c ("zigzag": causal attention is then equal work for all).
Sent       inside attention, per layer: ring attention's (c-1)/c KV forward and twice that backward,
           or Ulysses' eight all-to-alls (their files say it exactly). Once per step an all-reduce
           of the gradients, 2(c-1)/c P b: every rank saw other tokens. A mixture of experts counts
           over all tokens: per layer an all-gather of the E counts of each rank, and where experts
           have a capacity another of E counts for every piece of every sample (routing.py).
Memory     activations of T/c positions; parameters, gradients and optimiser state whole.
Paper      Liu et al. 2023, "Ring Attention"; Jacobs et al. 2023, "DeepSpeed Ulysses".

The model never mentions ranks. It has two seams: modules with an `attend(q, k, v, dropout)`, which
is replaced, and modules with `positions`, which are told where this rank's tokens stand.
On GPUs `library=True` uses torch.distributed.tensor.experimental.context_parallel instead.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh

from pardemo.strategies import base, parts, routing
from pardemo.strategies.ring_attention import RingAttention, chunks_of, positions_of
from pardemo.strategies.ulysses import UlyssesAttention

METHODS = ("ring", "ulysses")
KNOBS = {
    "method": '"ring" (rotate keys and values) or "ulysses" (trade positions for heads)',
    "balance": '"contiguous" or "zigzag" pieces of the sequence (ring)',
    "library": "torch's context_parallel (GPUs only)",
    "accumulate": "microbatches per optimiser step",
    "clip_grad": "largest global gradient norm",
}


class Context(base.Step):
    """Train on this rank's positions of every sample; gradients are summed over the ranks."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: base.Loss,
        mesh: DeviceMesh | None, balance: str, library: bool, accumulate: int,
        clip_grad: float | None,
    ) -> None:  # fmt: skip
        super().__init__(model, optimizer)
        self.loss, self.mesh, self.device = loss, mesh, base.this_device(mesh)
        self.axis = base.axis(mesh, "cp")
        self.balance, self.library = balance, library
        self.accumulate, self.clip_grad = accumulate, clip_grad

    def step(self, batch: Any) -> torch.Tensor:
        """Every rank takes all samples and its positions; the mean of their losses is the loss."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for i in range(self.accumulate):
            (inputs, targets), weight = base.take_shard(batch, i, self.accumulate)
            inputs, targets = base.to_device((inputs, targets), self.device)
            with self._mine(inputs, targets) as (tokens, labels):
                value = self.loss(self.model(tokens), labels) * (weight / self.axis.size)
                value.backward()
            total = total + value.detach()
        parts.add_gradients(self.model.parameters(), self.axis.group)
        base.clip_gradients(self.model.parameters(), self.clip_grad)
        self.optimizer.step()
        return base.reduce_sum(total, self.axis.group)

    @contextlib.contextmanager
    def _mine(self, inputs: Any, targets: Any) -> Any:
        """This rank's positions of inputs and targets, with the model told where they stand."""
        if self.axis.size == 1:
            yield inputs, targets
            return
        length = _length(inputs, targets)
        count = self.axis.size * (2 if self.balance == "zigzag" or self.library else 1)
        if length % count:
            raise base.StrategyError(
                f"a sequence of {length} tokens cannot be cut into {count} equal pieces "
                f"({self.axis.size} ranks, {self.balance}): pad it or change the ranks"
            )
        if self.library:
            with self._library(inputs.clone(), targets.clone(), length) as mine:
                yield mine
            return
        where = positions_of(self.axis.rank, self.axis.size, length, self.balance).to(self.device)
        with _standing_at(self.model, where):
            for layer in routing.seams(self.model):
                layer.exchange.samples = inputs.shape[0]
            yield inputs[:, where], targets[:, where]

    @contextlib.contextmanager
    def _library(self, inputs: torch.Tensor, targets: torch.Tensor, length: int) -> Any:
        """torch's own: shards the tensors in place and replaces the attention kernel (GPUs)."""
        from torch.distributed.tensor.experimental import context_parallel
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if any(p.dtype == torch.float64 for p in self.model.parameters()):
            raise base.StrategyError(
                "torch's context_parallel replaces fused kernels, which have no float64: train in "
                "float32 or bfloat16 (check.strategy(..., dtype=torch.float32))"
            )
        kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
        assert self.mesh is not None
        where = torch.arange(length, device=self.device)
        buffers = [inputs, targets, where]
        with context_parallel(
            self.mesh["cp"], buffers=buffers, buffer_seq_dims=[1, 1, 0],
            no_restore_buffers=set(buffers),
        ), sdpa_kernel(kernels), _standing_at(self.model, where):  # fmt: skip
            yield inputs, targets


@contextlib.contextmanager
def _standing_at(model: nn.Module, where: torch.Tensor) -> Any:
    """Tell every module with a `positions` seam which positions these tokens have."""
    seams: list[Any] = [m for m in model.modules() if hasattr(m, "positions")]
    for module in seams:
        module.positions = where
    try:
        yield
    finally:
        for module in seams:
            module.positions = None


def _length(inputs: Any, targets: Any) -> int:
    fits = isinstance(inputs, torch.Tensor) and isinstance(targets, torch.Tensor)
    if not fits or inputs.ndim < 2 or inputs.shape[:2] != targets.shape[:2]:
        raise base.StrategyError(
            "context parallelism splits dim 1 of inputs and targets, so both must be tensors of "
            "(samples, positions, ...)"
        )
    return inputs.shape[1]


def reasons_against(model: nn.Module, world_size: int, batch_size: int) -> list[str]:
    """Why the sequence of this model cannot be split: attention or positions have no seam."""
    found = []
    if not any(hasattr(m, "attend") for m in model.modules()):
        found.append(
            "no module has a replaceable attention `attend(q, k, v, dropout)`: without attention "
            "there is no sequence to split, with a built-in one no seam to split it at"
        )
    elif not any(hasattr(m, "positions") for m in model.modules()):
        found.append("no module takes `positions`: a rank cannot say where its tokens stand")
    return found


def _refuse(
    model: nn.Module, axis: base.Axis, device: torch.device, method: str, balance: str,
    library: bool,
) -> None:  # fmt: skip
    """Raise StrategyError for what cannot work, before anything is changed."""
    if method not in METHODS:
        raise base.StrategyError(f"method is one of {', '.join(METHODS)}, not {method!r}")
    if balance not in ("contiguous", "zigzag"):
        raise base.StrategyError(f'balance is "contiguous" or "zigzag", not {balance!r}')
    if method == "ulysses" and balance != "contiguous":
        raise base.StrategyError("Ulysses joins whole sequences: its balance is contiguous")
    if library and device.type == "cpu":
        raise base.StrategyError(
            "torch's context_parallel has no attention handler for CPU tensors: leave library=False"
        )
    if library and routing.seams(model):
        raise base.StrategyError(
            "torch's context_parallel orders positions itself, but experts are counted in the "
            "order of the batch: leave library=False"
        )
    against = reasons_against(model, axis.size, 0) if axis.size > 1 else []
    if against:
        raise base.StrategyError(against[0])


def build(
    model: nn.Module, make_optimizer: base.MakeOptimizer, loss: base.Loss,
    mesh: DeviceMesh | None = None, *, method: str = "ring", balance: str = "contiguous",
    library: bool = False, accumulate: int = 1, clip_grad: float | None = None,
) -> Context:  # fmt: skip
    """Split the sequence over the axis "cp", by method="ring" or "ulysses"; KNOBS explains."""
    axis, device = base.axis(mesh, "cp"), base.this_device(mesh)
    _refuse(model, axis, device, method, balance, library)
    model = model.to(device)
    base.broadcast_module(model, axis.group)
    if axis.group is not None and not library:
        ring = RingAttention(axis.group, balance=balance)
        seams: list[Any] = [m for m in model.modules() if hasattr(m, "attend")]
        for module in seams:
            module.attend = ring if method == "ring" else UlyssesAttention(axis.group)
        pieces = [chunks_of(rank, axis.size, balance) for rank in range(axis.size)]
        for layer in routing.seams(model):
            layer.exchange = routing.CountPositions(axis.group, layer.exchange, pieces)
    return Context(
        model, make_optimizer(model.parameters()), loss, mesh, balance, library, accumulate,
        clip_grad,
    )  # fmt: skip


STRATEGY = base.Strategy(
    name="context",
    title="context parallel",
    axes=("cp",),
    build=build,
    reasons_against=reasons_against,
    knobs=KNOBS,
    lesson="09_context_and_expert_parallelism",
)
