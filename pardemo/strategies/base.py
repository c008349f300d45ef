"""What every strategy shares: the Step it returns, the axes of its mesh, shards and broadcasts.

A strategy file imports torch and this module, and nothing else of pardemo. It defines

    def build(model, make_optimizer, loss, mesh, **knobs) -> Step
    STRATEGY = Strategy(name=..., title=..., axes=("dp",), build=build)

`loss(output, target)` is a mean over samples. A batch is the pair (inputs, targets), each a tensor
(or a tuple, list or dict of tensors) whose dim 0 counts samples. Every rank is handed the same
global batch and works on its own part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from pardemo.strategies.cut import StrategyError as StrategyError
from pardemo.strategies.cut import check_pieces as check_pieces
from pardemo.strategies.cut import cut as cut
from pardemo.strategies.cut import cut_by_hand as cut_by_hand
from pardemo.strategies.cut import entering as entering
from pardemo.strategies.cut import inseparable as inseparable
from pardemo.strategies.cut import no_view as no_view
from pardemo.strategies.cut import parameter_costs as parameter_costs
from pardemo.strategies.cut import pieces as pieces

State = dict[str, torch.Tensor]
Loss = Callable[[Any, Any], torch.Tensor]
MakeOptimizer = Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]


class Step:
    """One strategy at work on this rank: `step(batch)` trains once, `state()` shows the result.

    This base serves every strategy that keeps the whole model on each rank; a strategy that
    shards overrides `state` and `load`. `model` is the module this rank runs. `notes` are
    sentences a reader should know, such as what could not be split.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model = model
        self.optimizer = optimizer

    def step(self, batch: Any) -> torch.Tensor:
        """Make one optimiser step on the global `batch`; return the global mean loss (0-d)."""
        raise NotImplementedError

    def state(self) -> State:
        """Full, unsharded state dict on the CPU with the original keys (call on every rank)."""
        return to_cpu(self.original().state_dict())

    def load(self, state: State) -> None:
        """Take a full state dict, as `state()` returns it (call on every rank)."""
        self.original().load_state_dict(state)

    def original(self) -> nn.Module:
        """The learner's module inside whatever wrapper this strategy put around it."""
        return self.model


def nothing_against(model: nn.Module, world_size: int, batch_size: int) -> list[str]:
    """The `reasons_against` of a strategy that fits everything."""
    return []


def too_few_samples(model: nn.Module, world_size: int, batch_size: int) -> list[str]:
    """The `reasons_against` of a strategy that only splits the batch."""
    if batch_size < world_size:
        return [f"a batch of {batch_size} leaves some of {world_size} ranks without a sample"]
    return []


@dataclass(frozen=True)
class Strategy:
    """A row of the registry: what a strategy is called, which mesh it needs, how it is built.

    `axes` name the mesh, outermost first. `reasons_against(model, world_size, batch_size)` says why
    it does not fit (empty: it fits). `one_process(knobs)` is True where the strategy drives all
    its devices from one process, told by the knob `devices` if it has one. `degrees(world_size)`
    overrides how a world is factored over the axes.
    """

    name: str
    title: str
    axes: tuple[str, ...]
    build: Callable[..., Step]
    reasons_against: Callable[[nn.Module, int, int], list[str]] = nothing_against
    one_process: Callable[[dict[str, Any]], bool] = field(default=lambda knobs: False)
    degrees: Callable[[int], tuple[int, ...]] | None = None
    knobs: dict[str, str] = field(default_factory=dict)  # name -> one line of help
    lesson: str = ""

    def shape(self, world_size: int) -> tuple[int, ...]:
        """Degrees of the mesh's axes for this many ranks; their product is `world_size`."""
        if self.degrees is not None:
            return self.degrees(world_size)
        return factor(world_size, len(self.axes))

    def mesh(
        self, device_type: str | None = None, shape: tuple[int, ...] = ()
    ) -> DeviceMesh | None:
        """The DeviceMesh over all ranks of the running group; None for one rank (collective)."""
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if world_size == 1 or not self.axes:
            return None
        kind = device_type or this_device().type
        return init_device_mesh(kind, shape or self.shape(world_size), mesh_dim_names=self.axes)

    def place(self, devices: int, knobs: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """(ranks to launch, knobs for build) to run this strategy on `devices` devices."""
        if self.one_process(knobs):
            return 1, {"devices": devices, **knobs} if "devices" in self.knobs else knobs
        return devices, knobs


def factor(world_size: int, axes: int) -> tuple[int, ...]:
    """Spread the prime factors of `world_size` over `axes`, as even as they go, larger inside."""
    degrees, rest, prime, primes = [1] * max(axes, 1), world_size, 2, []
    while rest > 1:
        while rest % prime == 0:
            primes.append(prime)
            rest //= prime
        prime += 1
    for p in reversed(primes):
        smallest = min(range(len(degrees)), key=lambda i: (degrees[i], -i))
        degrees[smallest] *= p
    return tuple(sorted(degrees))


@dataclass(frozen=True)
class Axis:
    """This rank's place on one axis of the mesh: `rank` of `size`; `group` is None at degree 1."""

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def ranks(self) -> list[int]:
        """Global ranks on this axis, in its order."""
        return [0] if self.group is None else dist.get_process_group_ranks(self.group)


def axis(mesh: DeviceMesh | None, name: str) -> Axis:
    """This rank's place on the axis `name`; degree 1 when there is no mesh or no such axis."""
    if mesh is None or name not in (mesh.mesh_dim_names or ()):
        return Axis()
    size = mesh.size(mesh.mesh_dim_names.index(name))  # type: ignore[union-attr]
    if size == 1:
        return Axis()
    return Axis(size, mesh.get_local_rank(name), mesh.get_group(name))


def lines(mesh: DeviceMesh | None, name: str) -> list[list[int]]:
    """Global ranks along the axis `name`, for every place on the other axes of the mesh."""
    if mesh is None or name not in (mesh.mesh_dim_names or ()):
        return [[0]]
    dim = mesh.mesh_dim_names.index(name)  # type: ignore[union-attr]
    return mesh.mesh.movedim(dim, -1).reshape(-1, mesh.size(dim)).tolist()


def this_device(mesh: DeviceMesh | None = None) -> torch.device:
    """Where this rank puts its tensors: what the mesh says, else a GPU unless gloo carries data."""
    if mesh is not None:
        kind = mesh.device_type
    elif dist.is_initialized() and "nccl" not in str(dist.get_backend_config()):
        kind = "cpu"
    else:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def map_tensors(fn: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Apply `fn` to every tensor of a nested tuple, list or dict; other values stay."""
    if isinstance(value, torch.Tensor):
        return fn(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(fn, item) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(fn, item) for key, item in value.items()}
    return value


def call(model: nn.Module, inputs: Any) -> Any:
    """`model` on a batch's inputs: a tuple is its positional arguments, a dict its named ones."""
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def to_device(batch: Any, device: torch.device) -> Any:
    """The same batch on `device`."""
    return map_tensors(lambda t: t.to(device, non_blocking=True), batch)


def to_cpu(state: State) -> State:
    """An independent copy of a state dict on the CPU."""
    return {key: value.detach().to("cpu", copy=True) for key, value in state.items()}


def samples(batch: Any) -> int:
    """How many samples a batch has: the length of dim 0 of its first tensor."""
    if isinstance(batch, torch.Tensor):
        return batch.shape[0]
    parts = batch.values() if isinstance(batch, dict) else batch
    if not isinstance(batch, (tuple, list, dict)) or not parts:
        raise StrategyError(f"a batch must hold tensors, got {type(batch).__name__}")
    return samples(next(iter(parts)))


def take_shard(batch: Any, index: int, count: int) -> tuple[Any, float]:
    """Part `index` of `count` of a batch along dim 0, and its weight in the global mean.

    Sizes differ by at most one, the larger first. The weight is this part's share of the samples:
    sum over ranks of weight x (mean loss of the part) is the mean loss of the whole batch.
    """
    n = samples(batch)
    if n < count:
        raise StrategyError(
            f"a batch of {n} samples cannot be split into {count} parts: "
            f"use a batch of at least {count}, or fewer ranks or microbatches"
        )
    start = index * (n // count) + min(index, n % count)
    size = n // count + (index < n % count)
    return map_tensors(lambda t: t[start : start + size], batch), size / n


def microbatches(batch: Any, place: Axis, count: int = 1) -> list[tuple[Any, float]]:
    """This rank's part of the batch in `count` microbatches, each with its global weight.

    Raises StrategyError on every rank alike when some rank would lack a sample for one of them.
    """
    smallest = samples(batch) // place.size
    if smallest < count:
        raise StrategyError(
            f"a batch of {samples(batch)} over {place.size} ranks leaves {smallest} samples on "
            f"some rank: too few for {count} microbatch{'es' if count > 1 else ''}"
        )
    mine, share = take_shard(batch, place.rank, place.size)
    if count == 1:
        return [(mine, share)]
    parts = [take_shard(mine, i, count) for i in range(count)]
    return [(part, share * weight) for part, weight in parts]


@torch.no_grad()
def broadcast_module(module: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Give every rank of `group` the parameters and buffers of the group's rank 0.

    A tied tensor is sent once. Nothing happens at degree 1 (group None).
    """
    if group is None:
        return
    for tensor in dict.fromkeys([*module.parameters(), *module.buffers()]):
        dist.broadcast(tensor.detach(), group=group, group_src=0)  # moves the tensor, once per rank


@torch.no_grad()
def reduce_sum(value: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The sum of `value` over the ranks of `group`, on every rank; a new tensor."""
    value = value.detach().clone()
    if group is not None:
        dist.all_reduce(value, group=group)  # moves 2(n-1)/n * bytes of value
    return value


def reduce_mean(value: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The mean of `value` over the ranks of `group`, on every rank; a new tensor."""
    return reduce_sum(value, group) / (1 if group is None else group.size())


def clip_gradients(parameters: Iterable[torch.Tensor], max_norm: float | None) -> None:
    """Scale gradients to a global norm of at most `max_norm`; None leaves them alone."""
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
