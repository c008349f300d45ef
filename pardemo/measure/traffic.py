"""Count the bytes of the collectives and device copies that really run, by kind, group and phase.

A TorchDispatchMode sees every operator of the thread, so it sees what Python calls, what DDP's
reducer calls from C++ inside backward, what DTensor and FSDP2 issue, and point-to-point. It does
not see what other threads call. A mesh that spans all ranks uses the default group, so its axis
is called "world".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pardemo.measure import volumes
from pardemo.measure.phases import Phase, PhaseWatch


@dataclass(frozen=True)
class Flow:
    """All calls of one kind on one group in one phase, as one rank made them in one step.

    `payload_bytes` is the sum of whole arrays; `sent_bytes` what this rank put on the wire;
    `textbook_bytes` what the usual algorithm would have sent (`note` explains a difference).
    """

    kind: str
    group: str
    phase: Phase
    ranks: int
    calls: int
    payload_bytes: int
    sent_bytes: float
    textbook_bytes: float
    note: str = ""

    def __repr__(self) -> str:
        said = f": {self.note}" if self.note else ""
        return (
            f"{self.phase}: {self.calls} x {self.kind} on {self.group} ({self.ranks} ranks), "
            f"payload {self.payload_bytes / 1e6:.3f} MB, sent {self.sent_bytes / 1e6:.3f} MB{said}"
        )


@dataclass(frozen=True)
class Traffic:
    """Everything one rank sent in one step. Filters: kind=, group=, phase=."""

    rank: int
    flows: tuple[Flow, ...]

    def where(self, **which: str) -> list[Flow]:
        """The flows that match; TypeError for a filter that is not kind, group or phase."""
        for name in which:
            if name not in ("kind", "group", "phase"):
                raise TypeError(f"no filter {name!r}: filter by kind=, group= or phase=")
        return [f for f in self.flows if all(getattr(f, n) == v for n, v in which.items())]

    def calls(self, **which: str) -> int:
        """How many calls match."""
        return sum(flow.calls for flow in self.where(**which))

    def payload_bytes(self, **which: str) -> int:
        """Bytes of the whole arrays of the calls that match."""
        return sum(flow.payload_bytes for flow in self.where(**which))

    def sent_bytes(self, **which: str) -> float:
        """Bytes this rank put on the wire for the calls that match."""
        return sum(flow.sent_bytes for flow in self.where(**which))

    @property
    def textbook_bytes(self) -> float:
        """What the usual algorithms would have sent; differs from sent_bytes() only by `notes`."""
        return sum(flow.textbook_bytes for flow in self.flows)

    @property
    def notes(self) -> list[str]:
        """Why sent bytes differ from the textbook's, by name."""
        return list(dict.fromkeys(flow.note for flow in self.flows if flow.note))

    def __repr__(self) -> str:
        if not self.flows:
            return f"rank {self.rank} sends nothing"
        head = f"rank {self.rank} sends {self.sent_bytes() / 1e6:.3f} MB per step"
        return "\n  ".join([head, *map(repr, self.flows)])


class Counting(TorchDispatchMode):
    """Context that counts; `.traffic()` afterwards (or in between) says what was seen.

    The phase of a collective is "backward" while autograd runs a graph, "optimizer" inside
    Optimizer.step. Outside of both it takes the phase of the work beside it: one that brings data
    (receive, all-gather, broadcast) that of the work after it, any other that of the work before.
    So gradients summed by hand between backward and Optimizer.step belong to the backward. Work is
    an operator inside autograd or the optimizer, or one whose input needs a gradient: a forward.
    `watch` is a PhaseWatch that is open already, for those who enter from one of its hooks.
    """

    def __init__(self, watch: PhaseWatch | None = None) -> None:
        super().__init__()
        self._calls: list[tuple[volumes.Call, Phase]] = []
        self._waiting: list[int] = []  # brought data: the next work will tell its phase
        self._last: Phase = "forward"
        self._own_watch = watch is None
        self._watch = watch or PhaseWatch(before=self._updates, after=self._new_step)

    def _updates(self, optimizer: torch.optim.Optimizer) -> None:
        self._settle(self._last)

    def _new_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._last = "forward"

    def __enter__(self) -> Counting:
        if self._own_watch:
            self._watch.open()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._own_watch:
            self._watch.close()
        self._settle("forward")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # let DTensor come first: it may send inside this operator
        phase = self._watch.now()
        if func.namespace in volumes.NAMESPACES:
            name = func._schema.name.split("::")[1]
            for call in volumes.read(name, args):
                self._add(call, phase)
        elif phase != "forward" or _is_forward(func, args):
            self._settle(phase)
            self._last = phase
        out = func(*args, **(kwargs or {}))
        if func in _COPIES:
            self._note_copy(func, args, out, phase)
        return out

    def _add(self, call: volumes.Call, phase: Phase) -> None:
        if phase == "forward" and call.kind in _BRINGS:
            self._waiting.append(len(self._calls))
        elif phase == "forward":
            phase = self._last
        self._calls.append((call, phase))

    def _settle(self, phase: Phase) -> None:
        while self._waiting:
            at = self._waiting.pop()
            self._calls[at] = (self._calls[at][0], phase)

    def _note_copy(self, func: Any, args: tuple[Any, ...], out: Any, phase: Phase) -> None:
        source = args[1] if func is _COPIES[0] else args[0]
        if not isinstance(source, torch.Tensor) or source.device == out.device:
            return
        size = source.numel() * out.element_size()
        where = f"{source.device}->{out.device}"
        self._calls.append((volumes.Call("copy", where, 1, size, size, size), phase))

    def traffic(self) -> Traffic:
        """What was counted so far."""
        seen: dict[tuple[Any, ...], list[volumes.Call]] = {}
        for call, phase in self._calls:
            key = (call.kind, call.group, phase, call.ranks, call.note)
            seen.setdefault(key, []).append(call)
        rank = dist.get_rank() if dist.is_initialized() else 0
        return Traffic(rank, tuple(_flow(key, calls) for key, calls in seen.items()))

    @property
    def calls(self) -> list[volumes.Call]:
        """Every call, in order."""
        return [call for call, _ in self._calls]


_COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
_BRINGS = ("recv", "all_gather", "broadcast")
_LOOKS = (torch.ops.aten.detach.default, torch.ops.aten._local_scalar_dense.default)


def _is_forward(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operator belongs to a forward pass: autograd tracks one of its inputs.

    Taking a value out of the graph, as loss.detach() and loss.item() do, is no work of its own.
    """
    return (
        torch.is_grad_enabled()
        and func not in _LOOKS
        and any(isinstance(x, torch.Tensor) and x.requires_grad for x in tree_leaves(args))
    )


def _flow(key: tuple[Any, ...], calls: list[volumes.Call]) -> Flow:
    kind, group, phase, ranks, note = key
    return Flow(
        kind=kind,
        group=group,
        phase=phase,
        ranks=ranks,
        calls=len(calls),
        payload_bytes=sum(call.payload_bytes for call in calls),
        sent_bytes=sum(call.sent_bytes for call in calls),
        textbook_bytes=sum(call.textbook_bytes for call in calls),
        note=note,
    )


def count(step: Callable[[], object], warmup: int = 0) -> Traffic:
    """Run `step` once on this rank and count what it sends (call it on every rank).

    `warmup` steps run uncounted first: DDP rebuilds its buckets, and broadcasts their new order,
    in the second step.
    """
    for _ in range(warmup):
        step()
    with Counting() as counting:
        step()
    return counting.traffic()
