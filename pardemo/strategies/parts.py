"""The part of a model that this rank holds: its tensors by the original names, and their norm.

Shared by the strategies that give each rank some of the parameters, or a slice of each.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from pardemo.strategies.base import (
    MakeOptimizer,
    State,
    StrategyError,
    axis,
    broadcast_module,
    this_device,
)
from pardemo.strategies.tensor_attention import fused, unfused

Slot = tuple[nn.Module, str]


def slots(model: nn.Module, inside: Iterable[nn.Module] | None = None) -> dict[str, Slot]:
    """Where the tensors of `model`'s state dict live: key -> (module, attribute).

    With `inside`, only what these modules hold; a tensor they share under another name counts.
    A slot outlives the replacement of its tensor by a DTensor.
    """
    keys: dict[int, list[str]] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        keys.setdefault(id(tensor), []).append(key)
    found: dict[str, Slot] = {}
    for root in [model] if inside is None else inside:
        for module in root.modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                for key in keys.get(id(tensor), []):
                    found.setdefault(key, (module, name))
    return found


def read(held: dict[str, Slot]) -> State:
    """Full copies on the CPU of everything held; slices are gathered (call on every rank)."""
    state = {}
    for key, (module, name) in held.items():
        tensor = getattr(module, name).detach()
        if isinstance(tensor, DTensor):
            tensor = _full(tensor)
        if name in getattr(module, "reordered", ()):
            tensor = unfused(tensor)
        state[key] = tensor.to("cpu", copy=True)
    return state


def _full(tensor: DTensor) -> torch.Tensor:
    """The whole of a sliced tensor, one axis of the mesh after the other, the outermost first."""
    placements = list(tensor.placements)
    for i in range(len(placements)):
        placements[i] = Replicate()
        tensor = tensor.redistribute(placements=placements)  # moves (n-1)/n * bytes gathered
    return tensor.to_local()


@torch.no_grad()
def write(held: dict[str, Slot], state: State) -> None:
    """Copy a full state dict into everything held; each rank keeps its own slice."""
    missing = sorted(set(held) - set(state))
    if missing:
        raise StrategyError(f"the state dict lacks {', '.join(missing)}")
    for key, (module, name) in held.items():
        tensor, value = getattr(module, name), state[key]
        if tensor.shape != value.shape:
            raise StrategyError(
                f"{key} has shape {tuple(tensor.shape)}, the state dict {tuple(value.shape)}"
            )
        if name in getattr(module, "reordered", ()):
            value = fused(value)
        if isinstance(tensor, DTensor):
            local = value.to(tensor.to_local().device)
            value = distribute_tensor(
                local, tensor.device_mesh, tensor.placements, src_data_rank=None
            )
        tensor.copy_(value)


def gather(state: State, group: dist.ProcessGroup | None, keys: Iterable[str]) -> State:
    """The union of what the ranks of `group` hold, in the order of `keys`, on every rank."""
    if group is None:
        return {key: state[key] for key in keys}
    everyone: list[State] = [{}] * group.size()
    dist.all_gather_object(everyone, state, group=group)  # moves every rank's part to all others
    union = {key: value for part in everyone for key, value in part.items()}
    return {key: union[key] for key in keys}


def agree(model: nn.Module, mesh: DeviceMesh | None) -> None:
    """Give all ranks of the mesh the parameters and buffers of its first rank, axis by axis."""
    for name in (mesh.mesh_dim_names or ()) if mesh is not None else ():
        broadcast_module(model, axis(mesh, name).group)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's slice of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def squared_norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Sum of squares over full tensors, each counted once however it is sliced over meshes."""
    whole = torch.zeros((), dtype=torch.float64)
    sliced: dict[tuple[object, tuple[int, ...]], torch.Tensor] = {}
    for tensor in tensors:
        square = local(tensor).double().pow(2).sum()
        dims: tuple[int, ...] = ()
        if isinstance(tensor, DTensor):
            dims = tuple(i for i, p in enumerate(tensor.placements) if not p.is_replicate())
        if not dims:
            whole = whole.to(square.device) + square
            continue
        assert isinstance(tensor, DTensor)
        key = (tensor.device_mesh, dims)
        sliced[key] = sliced[key] + square if key in sliced else square
    for (mesh, dims), square in sliced.items():
        for dim in dims:
            dist.all_reduce(square, group=mesh.get_group(dim))  # type: ignore[attr-defined] # moves 2(n-1)/n * 8 bytes
        whole = whole.to(square.device) + square
    return whole


@torch.no_grad()
def clip(
    parameters: Iterable[torch.Tensor], max_norm: float | None,
    group: dist.ProcessGroup | None = None, elsewhere: Iterable[torch.Tensor] = (),
) -> None:  # fmt: skip
    """Scale gradients to a global norm of at most `max_norm`; None leaves them alone.

    The norm is that of the full model: slices are summed over their meshes, parts over `group`.
    `elsewhere` are parameters that another rank of `group` counts (the copy of a tied one).
    """
    if max_norm is None:
        return
    parameters = [p for p in parameters if p.grad is not None]
    skip = {id(p) for p in elsewhere}
    square = squared_norm(p.grad for p in parameters if id(p) not in skip)  # type: ignore[misc]
    if group is not None:
        square = square.to(this_device())  # a rank without gradients has made a zero on the CPU
        dist.all_reduce(square, group=group)  # moves 2(n-1)/n * 8 bytes
    factor = (max_norm / (square.sqrt() + 1e-6)).clamp(max=1.0)
    for p in parameters:
        local(p.grad).mul_(factor)  # type: ignore[arg-type]


@torch.no_grad()
def add(tensors: Iterable[torch.Tensor], group: dist.ProcessGroup | None) -> None:
    """Replace tensors by their sums over `group`, all in one message per dtype."""
    if group is None:
        return
    kinds: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(local(tensor))
    for same in kinds.values():
        flat = torch.cat([t.reshape(-1) for t in same])
        dist.all_reduce(flat, group=group)  # moves 2(n-1)/n * bytes of the tensors
        for t, total in zip(same, flat.split([t.numel() for t in same]), strict=True):
            t.copy_(total.view_as(t))


def settle(parameters: Iterable[torch.Tensor]) -> None:
    """Sum gradients of which each rank of a mesh has a part (norms under sequence parallelism)."""
    for p in parameters:
        parts = p.grad.placements if isinstance(p.grad, DTensor) else ()
        if isinstance(p, DTensor) and any(placement.is_partial() for placement in parts):
            grad: Any = p.grad
            p.grad = grad.redistribute(placements=p.placements)  # moves 2(n-1)/n * its bytes


@torch.no_grad()
def add_gradients(parameters: Iterable[torch.Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum the gradients of all trainable parameters over `group`, in place.

    A rank without a gradient for some parameter adds zeros. One that no rank has a gradient for
    ends without one, as in one process: an optimiser with weight decay or momentum would move it.
    """
    if group is None:
        return
    trainable = [p for p in parameters if p.requires_grad]
    given = [p.grad is not None for p in trainable]
    for p in trainable:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    add([p.grad for p in trainable if p.grad is not None], group)
    still = _all_zero([local(p.grad) for p in trainable])  # type: ignore[arg-type]
    if not still:
        return
    used = torch.tensor([given[i] for i in still], dtype=torch.int32)
    used = used.to(local(trainable[still[0]]).device)
    dist.all_reduce(used, group=group)  # moves 2(n-1)/n * 4 bytes for each gradient that is zero
    for i, ranks in zip(still, used.tolist(), strict=True):
        if not ranks:
            trainable[i].grad = None


def _all_zero(tensors: list[torch.Tensor]) -> list[int]:
    """Numbers of the tensors that are zero throughout; a few values are looked at first."""
    if not tensors:
        return []
    few = [t.flatten()[:: max(1, t.numel() // 8)].abs().sum().double() for t in tensors]
    doubtful = [i for i, total in enumerate(torch.stack(few).tolist()) if total == 0]
    return [i for i in doubtful if not bool(tensors[i].any())]


def optimizers(
    parameters: Iterable[torch.Tensor], make_optimizer: MakeOptimizer
) -> list[torch.optim.Optimizer]:
    """One optimiser for the slices and one for whole tensors, since kernels refuse a mixture.

    None for parameters that are not there: a stage may consist of activations alone.
    """
    kinds: dict[object, list[torch.Tensor]] = {}
    for p in parameters:
        kinds.setdefault(p.device_mesh if isinstance(p, DTensor) else None, []).append(p)
    return [make_optimizer(group) for group in kinds.values()]
