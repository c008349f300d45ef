"""Count a user's own model without running it for real: FLOPs, parameters, activations, messages.

`describe(make_model, loss, batch)` works on the meta device: a model of any size costs no memory.
`messages(build, axes)` runs one step of any strategy under a fake process group of up to 1,024
ranks in this one process and counts what rank 0 would send. Both feed pardemo.predict.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from pardemo.measure import Traffic, count
from pardemo.predict import Layers
from pardemo.predict.prediction import human

KINDS = (
    (nn.modules.conv._ConvNd, "conv"),
    (nn.MultiheadAttention, "attention"),
    (nn.Embedding, "embedding"),
    ((nn.LayerNorm, nn.modules.batchnorm._BatchNorm), "norm"),
)


@dataclass(frozen=True)
class Counted:
    """What one training step of a model costs: `layers` per sample, totals for the whole batch.

    `saved_bytes` is what autograd keeps for the backward pass, parameters left out.
    """

    layers: Layers
    batch: int
    parameters: int
    buffers_bytes: int
    forward_flops: float
    backward_flops: float
    saved_bytes: int

    def __repr__(self) -> str:
        return (
            f"{self.parameters:,} parameters; a batch of {self.batch} takes "
            f"{human(self.forward_flops, 'flops')} forward, "
            f"{human(self.backward_flops, 'flops')} backward, and keeps "
            f"{human(self.saved_bytes, 'bytes')} for backward"
        )


def describe(
    make_model: Callable[[], nn.Module],
    loss: Callable[[Any, Any], torch.Tensor],
    batch: tuple[Any, Any],
    name: str = "model",
) -> Counted:
    """Count one forward and backward of `make_model()` on `batch` = (inputs, targets).

    Runs on the meta device: only shapes are computed. `batch` may be real or meta; dim 0 counts
    samples. Attention is counted as matrix products (on a CPU its fused kernel counts as 0), the
    causal half included. Models whose shapes depend on values raise torch's meta error.
    """
    with torch.device("meta"):
        model = make_model()
    model = model.to("meta")
    inputs, targets = tree_map(_to_meta, batch)
    samples = int(tree_leaves(inputs)[0].shape[0])
    saved = _Saved(model)
    watch = _Watch(model)
    with sdpa_kernel(SDPBackend.MATH), torch.device("meta"):
        with saved, watch, FlopCounterMode(display=False) as forward:
            watch.counter = forward
            value = loss(model(inputs), targets)
        with FlopCounterMode(display=False) as backward:
            value.backward()
    return Counted(
        watch.layers(name, samples, float(backward.get_total_flops())),
        samples,
        sum(p.numel() for p in model.parameters()),
        sum(b.numel() * b.element_size() for b in model.buffers()),
        float(forward.get_total_flops()),
        float(backward.get_total_flops()),
        saved.bytes,
    )


def pieces(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The model's ordered pieces: its own `sequence()`, or its children (lists opened)."""
    own = getattr(model, "sequence", None)
    if callable(own):
        return list(own())
    found: list[tuple[str, nn.Module]] = []
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            found += [(f"{name}.{k}", m) for k, m in child.named_children()]
        else:
            found.append((name, child))
    return found or [("model", model)]


class _Watch(contextlib.AbstractContextManager["_Watch"]):
    """Hooks that note each piece's FLOPs and the bytes of its output during forward."""

    def __init__(self, model: nn.Module) -> None:
        self.pieces, self.counter = pieces(model), FlopCounterMode(display=False)
        self.flops = [0.0] * len(self.pieces)
        self.output = [0] * len(self.pieces)
        self.from_data = [False] * len(self.pieces)  # its input needs no gradient
        self._hooks: list[Any] = []

    def __enter__(self) -> _Watch:
        for i, (_, module) in enumerate(self.pieces):
            self._hooks.append(module.register_forward_pre_hook(self._before(i)))
            self._hooks.append(module.register_forward_hook(self._after(i)))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.flops[i] -= self.counter.get_total_flops()
            given = [t for t in tree_leaves(args) if torch.is_tensor(t)]
            self.from_data[i] = not any(t.requires_grad for t in given)

        return hook

    def _after(self, i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            self.flops[i] += self.counter.get_total_flops()
            self.output[i] += _bytes(out)

        return hook

    def backward(self, total: float) -> list[float]:
        """FLOPs of each piece's backward: 2 for 1 forward, and what is left for the first ones.

        Those work on data, which needs no gradient: they compute the gradients of parameters only.
        """
        first = sum(f for f, data in zip(self.flops, self.from_data, strict=True) if data)
        left = total - 2 * (sum(self.flops) - first)
        share = min(2.0, max(0.0, left / first)) if first else 2.0
        return [
            f * (share if data else 2.0) for f, data in zip(self.flops, self.from_data, strict=True)
        ]

    def layers(self, name: str, samples: int, backward: float) -> Layers:
        """The pieces as the predictor's `Layers`, per sample; `backward` FLOPs of all."""
        modules = [m for _, m in self.pieces]
        return Layers(
            tuple(n for n, _ in self.pieces),
            tuple(f / samples for f in self.flops),
            tuple(sum(p.numel() for p in m.parameters()) for m in modules),
            tuple(b / samples for b in self.output),
            tuple(b / samples for b in self.output),
            name,
            tuple(_kind(m) for m in modules),
            tuple(f / samples for f in self.backward(backward)),
        )


class _Saved(contextlib.AbstractContextManager["_Saved"]):
    """Sums the tensors autograd saves, each storage once, parameters and buffers left out."""

    def __init__(self, model: nn.Module) -> None:
        kept = [*model.parameters(), *model.buffers()]
        self._skip = {t.untyped_storage()._cdata for t in kept}
        self._alive: list[torch.Tensor] = []
        self.bytes = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._skip:
            self._skip.add(storage._cdata)
            self._alive.append(tensor)  # a freed storage's address could be used again
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> _Saved:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


def _to_meta(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf


def _bytes(tree: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tree) if torch.is_tensor(t))


def _kind(module: nn.Module) -> str:
    for types, kind in KINDS:
        if isinstance(module, types):  # type: ignore[arg-type]
            return kind
    inner = {_kind(m) for m in module.children()}
    return "conv" if "conv" in inner else "linear"


@contextlib.contextmanager
def fake_world(ranks: int, rank: int = 0) -> Iterator[None]:
    """Be `rank` of `ranks` ranks that do not exist: collectives return at once and move nothing.

    RuntimeError when a real process group is running here.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a process group is running here: fake_world needs a process of its own")
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Chunks:
    """torch.chunk's pieces of a tensor, empty ones included, made only when asked for."""

    def __init__(self, tensor: torch.Tensor, count: int, dim: int) -> None:
        self.tensor, self.count, self.dim = tensor, count, dim

    def __getitem__(self, i: int) -> torch.Tensor:
        size = self.tensor.size(self.dim)
        each = -(-size // self.count)
        start = min(i * each, size)
        return self.tensor.narrow(self.dim, start, min(each, size - start))


@contextlib.contextmanager
def _lazy_chunks() -> Iterator[None]:
    """FSDP2 cuts each parameter into as many fake tensors as ranks and uses two: make those two."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    own = getattr(_fsdp_param, "_chunk_with_empty", None)
    if own is None:  # another torch: slower, the same counts
        yield
        return
    _fsdp_param._chunk_with_empty = _Chunks  # type: ignore[assignment]
    try:
        yield
    finally:
        _fsdp_param._chunk_with_empty = own


def messages(
    build: Callable[[DeviceMesh], Callable[[], object]],
    axes: dict[str, int],
    rank: int = 0,
    warmup: int = 0,
    fake: bool = True,
) -> Traffic:
    """What `rank` would send in one step on a mesh of `axes` (name -> degree), 1,024 ranks or more.

    `build(mesh)` makes model and optimiser and returns the step to run. With `fake`, all tensors it
    makes are fake: they have shapes and no memory. DDP needs a Python comm hook here, pipelines a
    real group. Values are meaningless; counts are exact.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    ranks = 1
    for degree in axes.values():
        ranks *= degree
    with fake_world(ranks, rank):
        # a mesh reads values of its rank table, so it must not be fake
        mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext():
            with _lazy_chunks():
                step = build(mesh)
            return count(step, warmup)
