"""weigh(): what one training step keeps in memory on this rank, by kind, and when it is most.

On a CPU every tensor's storage is counted from its first appearance to its end, in this thread and
in those that the step starts; on a GPU the peak is the allocator's. Parts of sharded tensors
(DTensor) count with their local shard.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pardemo.measure.memory_gpu import on_gpu, uses_gpu
from pardemo.measure.phases import PhaseWatch


@dataclass(frozen=True)
class MemoryReport:
    """Bytes on one rank: each kind at its own largest, and the peak of all storages together.

    `activations_bytes`: tensors kept for the backward pass, without parameters and buffers.
    `peak_at` says in which phase the peak was, and in which operator.
    """

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    buffers_bytes: int
    peak_bytes: int
    peak_at: str = ""

    @property
    def states_bytes(self) -> int:
        """What stays between steps: parameters, gradients, optimizer state, buffers."""
        kept = self.parameters_bytes + self.gradients_bytes
        return kept + self.optimizer_bytes + self.buffers_bytes

    def __repr__(self) -> str:
        names = ("parameters", "gradients", "optimizer", "activations", "buffers")
        parts = [f"{name} {getattr(self, f'{name}_bytes') / 1e6:.3f}" for name in names]
        where = f", reached in {self.peak_at}" if self.peak_at else ""
        return f"memory [MB]: {', '.join(parts)}; peak {self.peak_bytes / 1e6:.3f}{where}"


def weigh(
    step: Callable[[], object],
    model: nn.Module | None = None,
    snapshot: str | Path | None = None,
) -> MemoryReport:
    """Run `step` once on this rank and weigh what it keeps (call it on every rank).

    Warm up first: optimizers make their state in their first step. `model` names the parameters
    and buffers; without it the parameters are those of the optimizers that step. The peak is at
    times one transfer's buffer larger, where a thread of gloo's lets go of it late. On GPUs
    `snapshot` is a path for torch's allocator history (open it at pytorch.org/memory_viz).
    """
    with _Scale(model) as scale:
        if uses_gpu(model):
            peak, where = on_gpu(step, snapshot)
        else:
            step()
            peak, where = scale.peak, scale.peak_at
    return MemoryReport(
        parameters_bytes=_bytes(scale.parameters()),
        gradients_bytes=scale.gradients,
        optimizer_bytes=_bytes(scale.optimizer_state()),
        activations_bytes=scale.saved_peak,
        buffers_bytes=_bytes(model.buffers()) if model is not None else 0,
        peak_bytes=peak,
        peak_at=where,
    )


class _Scale(TorchDispatchMode):
    """Watches storages come and go, and what autograd saves for the backward pass."""

    def __init__(self, model: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.optimizers: dict[int, torch.optim.Optimizer] = {}
        self.live = self.peak = self.gradients = 0
        self.saved = self.saved_peak = 0
        self.peak_at = ""
        self._known: dict[int, int] = {}
        self._saved: dict[int, list[int]] = {}  # storage -> [times saved, bytes]
        self._watch = PhaseWatch(before=self._weigh_gradients)
        self._hooks = self._kept_hooks()
        self._lock = threading.RLock()
        self._threads = mock.patch.object(threading.Thread, "start", self._starter())
        self._resized = mock.patch.object(torch.UntypedStorage, "resize_", self._resizer())

    def __enter__(self) -> _Scale:
        if self.model is not None:
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                self._see(tensor, "what was there before")
                if tensor.grad is not None:
                    self._see(tensor.grad, "what was there before")
        self._watch.open()
        self._hooks.__enter__()
        self._threads.start()
        self._resized.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._resized.stop()
        self._threads.stop()
        self._hooks.__exit__(*error)
        self._watch.close()
        self.gradients = max(self.gradients, _bytes(_gradients(self.parameters())))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.look(out, func._schema.name)
        return out

    def look(self, value: Any, operator: str) -> None:
        """Count the tensors that an operator returned, in whichever thread it ran."""
        for leaf in tree_leaves(value):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf, operator)

    def _starter(self) -> Callable[[threading.Thread], None]:
        """Thread.start, of threads in which operators and what autograd saves are seen too.

        Both are looked at by thread: without this, replicas in threads would weigh nothing.
        """
        start = threading.Thread.start

        def started(thread: threading.Thread) -> None:
            run = thread.run

            def seen() -> None:
                with _InThread(self), self._kept_hooks():
                    run()

            thread.run = seen  # type: ignore[method-assign]
            start(thread)

        return started

    def _resizer(self) -> Callable[[torch.UntypedStorage, int], Any]:
        """UntypedStorage.resize_, which is no operator: FSDP empties a unit's storage by it."""
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            done = resize(storage, size)
            with self._lock:
                if storage._cdata in self._known:
                    self.live += storage.nbytes() - self._known[storage._cdata]
                    self._known[storage._cdata] = storage.nbytes()
            return done

        return resized

    def _kept_hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._pack, lambda kept: kept.tensor)

    def parameters(self) -> list[torch.Tensor]:
        """The model's parameters, or those of the optimizers that stepped."""
        if self.model is not None:
            return list(self.model.parameters())
        groups = (group for o in self.optimizers.values() for group in o.param_groups)
        return [p for group in groups for p in group["params"]]

    def optimizer_state(self) -> Iterator[torch.Tensor]:
        """Tensors of the optimizers' states."""
        for optimizer in self.optimizers.values():
            yield from (t for t in tree_leaves(dict(optimizer.state)) if torch.is_tensor(t))

    def _weigh_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        if id(optimizer) not in self.optimizers:
            self.optimizers[id(optimizer)] = optimizer
            before = self.live
            for tensor in self.optimizer_state():
                self._see(tensor, "what was there before", at_peak=False)
            self.peak += self.live - before  # it was there all along, at the peak too
        self.gradients = max(self.gradients, _bytes(_gradients(self.parameters())))

    def _see(self, tensor: torch.Tensor, operator: str, at_peak: bool = True) -> None:
        storage = _local(tensor).untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        with self._lock:
            before = self._known.get(key)
            if before == size or tensor.device.type == "meta":
                return
            if before is None:
                weakref.finalize(storage, _tell, weakref.WeakMethod(self._gone), key)
            self._known[key] = size
            self.live += size - (before or 0)
            if at_peak and self.live > self.peak:
                self.peak, self.peak_at = self.live, f"{self._watch.now()} ({operator})"

    def _gone(self, key: int) -> None:
        with self._lock:
            self.live -= self._known.pop(key, 0)

    def _pack(self, tensor: torch.Tensor) -> Any:
        source = tensor._base if tensor._base is not None else tensor
        local = _local(tensor)
        kept = _Kept(tensor)
        if isinstance(source, nn.Parameter) or local.device.type == "meta" or self._is_own(local):
            return kept
        storage = local.untyped_storage()
        with self._lock:
            entry = self._saved.setdefault(storage._cdata, [0, storage.nbytes()])
            if entry[0] == 0:
                self.saved += entry[1]
                self.saved_peak = max(self.saved_peak, self.saved)
            entry[0] += 1
        weakref.finalize(kept, _tell, weakref.WeakMethod(self._released), storage._cdata)
        return kept

    def _released(self, key: int) -> None:
        with self._lock:
            entry = self._saved[key]
            entry[0] -= 1
            if entry[0] == 0:
                self.saved -= self._saved.pop(key)[1]

    def _is_own(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor shares the storage of a parameter or buffer of the model."""
        if self.model is None:
            return False
        key = tensor.untyped_storage()._cdata
        own = (*self.model.parameters(), *self.model.buffers())
        return any(_local(t).untyped_storage()._cdata == key for t in own)


def _tell(method: weakref.WeakMethod[Callable[[int], None]], key: int) -> None:
    """Call a scale's method unless the scale is gone.

    What `finalize` calls lives as long as what it watches: a scale held by it would hold its model,
    and so the very tensors that are watched, for ever.
    """
    found = method()
    if found is not None:
        found(key)


class _InThread(TorchDispatchMode):
    """Shows the operators of one more thread to a scale: a mode serves the thread it entered in."""

    def __init__(self, scale: _Scale) -> None:
        super().__init__()
        self._scale = scale

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self._scale.look(out, func._schema.name)
        return out


@dataclass(eq=False)
class _Kept:
    """A saved tensor; its end is the end of what autograd keeps."""

    tensor: torch.Tensor


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return getattr(tensor, "_local_tensor", tensor)


def _gradients(parameters: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    return (p.grad for p in parameters if p.grad is not None)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of these tensors' elements; a tensor listed twice (tied weights) counts once."""
    unique = {id(t): _local(t) for t in tensors}
    return sum(t.numel() * t.element_size() for t in unique.values())
