"""Consecutive parts of a model on ranks, one after another: activations forward, gradients back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn

from pardemo.strategies import base, parts

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
HEADER = 10  # dtype, dimensions, sizes: a boundary tensor of up to 8 dimensions


class Span(NamedTuple):
    """What this rank did from `start_s` to `end_s` (time.perf_counter), and the bytes it moved."""

    kind: str
    start_s: float
    end_s: float
    bytes: int = 0


class OnRanks(base.Step):
    """Rank r holds part r; `spans` tell what this rank did in the last step."""

    def __init__(
        self, model: nn.Module, cut: Sequence[Sequence[tuple[str, nn.Module]]],
        make_optimizer: base.MakeOptimizer, loss: base.Loss, place: base.Axis,
        device: torch.device, clip_grad: float | None,
    ) -> None:  # fmt: skip
        mine = [module for _, module in cut[place.rank]]
        super().__init__(nn.Sequential(*mine))
        self.names = [name for name, _ in cut[place.rank]]
        self.loss, self.place, self.device, self.clip_grad = loss, place, device, clip_grad
        self.keys = list(model.state_dict())
        self.held = parts.slots(model, mine)
        if place.rank == 0:  # buffers that no piece uses are still in the state dict
            used = parts.slots(model, [module for part in cut for _, module in part])
            everything = parts.slots(model)
            self.held |= {key: everything[key] for key in everything if key not in used}
        refuse_shared_statistics(cut)
        self.tied = tied(cut)
        parameters = list(self.model.parameters())
        self.optimizer = make_optimizer(parameters) if parameters else None
        self.known: dict[Any, tuple[torch.dtype, list[int]]] = {}
        self.spans: list[Span] = []

    def step(self, batch: Any) -> torch.Tensor:
        """Receive, forward, send; receive the gradient, backward, send; then the optimiser."""
        inputs, targets = base.to_device(batch, self.device)
        first, last = self.place.rank == 0, self.place.rank == self.place.size - 1
        self.spans = []
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        shape = _shapes(batch)
        x = inputs if first else self.receive_activation(shape).requires_grad_()
        with self.span("forward"):
            out = self.model(x if first else base.entering(x))
            if last:
                out = self.loss(out, targets)
        grad = None
        if not last:
            self.send_activation(out, shape)
            grad = torch.empty(out.shape, dtype=out.dtype, device=out.device)  # contiguous
            self.receive(grad, self.place.rank + 1)
        with self.span("backward"):
            if out.requires_grad:  # not when everything up to here is frozen
                out.backward(grad)
        if not first:
            x_grad = torch.zeros_like(x) if x.grad is None else x.grad
            self.send(x_grad, self.place.rank - 1)
        return self.finish(out.detach() if last else torch.zeros((), device=self.device))

    def finish(self, loss: torch.Tensor) -> torch.Tensor:
        """Gradients of shared parameters, clipping, the optimiser, and the loss to everybody."""
        for parameter, owners in self.tied:
            self.add_up(parameter, owners)
        copies = [p for p, owners in self.tied if owners[0] != self.place.rank]
        parts.clip(self.model.parameters(), self.clip_grad, self.place.group, copies)
        with self.span("optimizer"):
            if self.optimizer is not None:
                self.optimizer.step()
        if self.place.group is None:
            return loss
        loss = loss.to(torch.float64)  # ranks before the last do not know the loss's dtype
        dist.broadcast(loss, group=self.place.group, group_src=self.place.size - 1)  # 8 bytes
        return loss

    def add_up(self, parameter: nn.Parameter, owners: list[int]) -> None:
        """Sum the gradients of a parameter that several parts use, on its first owner, and back."""
        if self.place.rank not in owners or not parameter.requires_grad:
            return
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if self.place.rank != owners[0]:
            self.send(parameter.grad, owners[0])
            self.receive(parameter.grad, owners[0])
            return
        other = torch.empty_like(parameter.grad)
        for owner in owners[1:]:
            self.receive(other, owner)
            parameter.grad += other
        for owner in owners[1:]:
            self.send(parameter.grad, owner)

    def send_activation(self, value: Any, key: Any) -> None:
        """Send to the next part; of a shape seen for the first time, its sizes first."""
        if not isinstance(value, torch.Tensor) or value.dtype not in DTYPES:
            raise base.StrategyError(
                f"{self.names[-1]} returns {getattr(value, 'dtype', type(value).__name__)}: only "
                "a floating-point tensor can be handed to the next part"
            )
        if key not in self.known:
            self.known[key] = value.dtype, list(value.shape)
            sizes = list(value.shape) + [0] * (HEADER - 2 - value.dim())
            header = [DTYPES.index(value.dtype), value.dim(), *sizes]
            self.send(torch.tensor(header, device=self.device), self.place.rank + 1)
        self.send(value.detach(), self.place.rank + 1)

    def receive_activation(self, key: Any) -> torch.Tensor:
        """What the part before this one computed."""
        source = self.place.rank - 1
        if (source, key) not in self.known:
            header = torch.empty(HEADER, dtype=torch.int64, device=self.device)
            self.receive(header, source)
            kind, dims, *sizes = header.tolist()
            self.known[source, key] = DTYPES[kind], sizes[:dims]
        dtype, shape = self.known[source, key]
        value = torch.empty(shape, dtype=dtype, device=self.device)
        self.receive(value, source)
        return value

    def send(self, tensor: torch.Tensor, to: int) -> None:
        with self.span("send", tensor.numel() * tensor.element_size()):
            dist.send(tensor.contiguous(), group=self.place.group, group_dst=to)  # moves the tensor

    def receive(self, tensor: torch.Tensor, source: int) -> None:
        with self.span("wait", tensor.numel() * tensor.element_size()):
            dist.recv(tensor, group=self.place.group, group_src=source)  # moves the tensor

    @contextmanager
    def span(self, kind: str, size: int = 0) -> Iterator[None]:
        """Note when this rank began and ended something."""
        start = time.perf_counter()
        yield
        self.spans.append(Span(kind, start, time.perf_counter(), size))

    def state(self) -> base.State:
        """The union of all parts, under the original names (call on every rank)."""
        return parts.gather(parts.read(self.held), self.place.group, self.keys)

    def load(self, state: base.State) -> None:
        """Each rank takes its part of a full state dict."""
        parts.write(self.held, state)


def _shapes(batch: Any) -> tuple[Any, ...]:
    """What decides the shapes inside: those of the inputs, which every rank knows."""
    found: list[Any] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    base.map_tensors(note, batch)
    return tuple(found)


def tied(cut: Sequence[Sequence[tuple[str, nn.Module]]]) -> list[tuple[nn.Parameter, list[int]]]:
    """Parameters that several parts use, and the numbers of those parts."""
    owners: dict[nn.Parameter, list[int]] = {}
    for number, part in enumerate(cut):
        for parameter in dict.fromkeys(p for _, module in part for p in module.parameters()):
            owners.setdefault(parameter, []).append(number)
    return [(parameter, found) for parameter, found in owners.items() if len(found) > 1]


def refuse_shared_statistics(cut: Sequence[Sequence[tuple[str, nn.Module]]]) -> None:
    """Raise StrategyError when a buffer is used by two parts: its copies would drift apart."""
    seen: dict[int, int] = {}
    for number, part in enumerate(cut):
        for name, module in part:
            for key, buffer in module.named_buffers():
                if seen.setdefault(id(buffer), number) != number:
                    raise base.StrategyError(
                        f"{name}.{key} is shared with part {seen[id(buffer)]}: a buffer cannot be "
                        "kept equal on two ranks. Cut elsewhere (starts=...) so that one part "
                        "holds all its uses"
                    )
