"""Memory per rank by formula: every state to the byte, activations from one process's own.

States follow from which tensors a rank holds: parameters b P, gradients b P of the trainable ones,
the optimiser's two or one values each, buffers. Activations are those of one process that runs
what the rank runs (its share of the samples, its stage, its slice of the layers, its positions), as
often as that is in flight. Experts are taken to get as many rows as their own rank sends out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn as nn

from pardemo.measure import weigh
from pardemo.predict.strategy_memory import OPTIMIZER_STATES, peak_bytes
from pardemo.strategies import fsdp, routing, zero1
from pardemo.strategies.base import call
from pardemo.strategies.replicas import model_bytes
from pardemo.strategies.ring_attention import positions_of

from . import alone
from . import scene as facts
from .scene import Scene

KINDS = ("parameters", "gradients", "optimizer", "buffers", "activations")
SHARDED = ("fsdp", "hsdp", "fsdp_tp")
STAY = ("ddp", "zero1", "pipeline", "dp_pp", "tp_pp", "dp_pp_tp")  # gradients beside activations
FLAT = ("context", "expert", "dp_tp", "dp_pp", "dp_pp_tp")  # gradients summed in one message
KNOWN = {"sequence_parallel", "method", "balance"}
Shapes = dict[nn.Parameter, tuple[int, ...]]
Knobs = Mapping[str, Any]
NONE: Knobs = {}


def forecast(name: str, scene: Scene, rank: int, ranks: int, knobs: Knobs = NONE) -> dict[str, Any]:
    """`memory_formula`: bytes of every kind on `rank`, and of the peak; empty where unknown.

    Of the strategy's `knobs` it knows `sequence_parallel`, and context's `method` and `balance`.
    """
    kind = _optimizer(scene)
    if kind is None or not set(knobs) <= KNOWN:
        return {}
    shapes, module = held(name, scene, rank if ranks > 1 else 0, ranks)
    trained = {p: s for p, s in shapes.items() if p.requires_grad}
    found = {
        "parameters_bytes": _bytes(shapes),
        "gradients_bytes": _bytes(trained),
        "optimizer_bytes": _states(kind, _owned(name, shapes, rank, ranks)),
        "buffers_bytes": float(sum(b.numel() * b.element_size() for b in module.buffers())),
    }
    found["activations_bytes"] = activations(name, scene, rank, ranks, module, knobs)
    if name == "data_parallel":
        found["activations_bytes"] += _replicas(scene)
    found["peak_bytes"] = peak_bytes(
        **found,
        gathered_bytes=_gathered(name, scene, ranks),
        gradients_stay=name in STAY and ranks > 1,
        copied_bytes=_copied(name, scene, shapes, ranks),
    )
    return {"memory_formula": found}


def _replicas(scene: Scene) -> float:
    """The copies of the model in one process's replicas: no leaves, kept by autograd."""
    first = -(-scene.batch_size // scene.ranks)  # torch.chunk's size: some device may get nothing
    return float((-(-scene.batch_size // first) - 1) * model_bytes(scene.model))


def _copied(name: str, scene: Scene, shapes: Shapes, ranks: int) -> float:
    """The gradients that are summed over ranks in one flat message, a copy of them."""
    axes = scene.degrees(name) if ranks > 1 else {}
    if name not in FLAT or axes.get("dp", 2) == 1:
        return 0.0
    layers = routing.seams(scene.model) if name == "expert" else []
    experts = {p for layer in layers for p in layer.experts.parameters()}
    return _bytes({p: s for p, s in shapes.items() if p.requires_grad and p not in experts})


def held(name: str, scene: Scene, rank: int, ranks: int) -> tuple[Shapes, nn.Module]:
    """Which parameters a rank holds in which shapes, and the module it runs."""
    model = scene.model
    if ranks == 1 or not scene.degrees(name):
        return facts.slices(model, 1), model
    axes, place = scene.degrees(name), scene.place(name, rank)
    module: nn.Module = model
    if name == "model_parallel":
        module = scene.parts(axes["pp"])[rank]
    elif "pp" in axes:
        size = scene.batch_size // axes.get("dp", 1)
        module = scene.stages(axes["pp"], size // scene.microbatches(size, axes["pp"]))[place["pp"]]
    shapes = facts.slices(module, axes.get("tp", 1))
    if name in SHARDED:
        axis = "shard" if "shard" in axes else "dp"
        shapes = {p: _chunk(s, place[axis], axes[axis]) for p, s in shapes.items()}
    if name == "expert":
        for layer in routing.seams(model):
            for index, expert in enumerate(layer.experts.values()):
                if not _mine(index, len(layer.experts), rank, ranks):
                    for p in expert.parameters():
                        del shapes[p]
    return shapes, module


def _chunk(shape: tuple[int, ...], rank: int, ranks: int) -> tuple[int, ...]:
    """This rank's part of dim 0 as torch.chunk deals it; a scalar stays."""
    if not shape:
        return shape
    rows = -(-shape[0] // ranks)
    return (max(0, min(rows, shape[0] - rank * rows)), *shape[1:])


def _mine(index: int, experts: int, rank: int, ranks: int) -> bool:
    sizes = [experts // ranks + (r < experts % ranks) for r in range(ranks)]
    return sum(sizes[:rank]) <= index < sum(sizes[: rank + 1])


def _owned(name: str, shapes: Shapes, rank: int, ranks: int) -> Shapes:
    """The trained tensors that this rank's optimiser keeps state for.

    Under ZeRO-1 whole tensors, frozen ones too, are dealt out largest first to the least loaded.
    """
    owners = zero1.owners([math.prod(shape) for shape in shapes.values()], ranks)
    return {
        p: shape for (p, shape), owner in zip(shapes.items(), owners, strict=True)
        if p.requires_grad and (name != "zero1" or owner == rank)
    }  # fmt: skip


def _optimizer(scene: Scene) -> str | None:
    made = scene.work.make_optimizer(scene.parameters)
    kind = type(made).__name__.lower()
    if kind == "sgd" and made.defaults.get("momentum"):
        kind = "momentum"
    return kind if kind in OPTIMIZER_STATES else None


def _states(kind: str, shapes: Shapes) -> float:
    """Moments of the optimiser; Adam also counts the steps of every tensor, 4 bytes each."""
    counters = 4 * len(shapes) if kind.startswith("adam") else 0
    return OPTIMIZER_STATES[kind] * _bytes(shapes) + counters


def _bytes(shapes: Shapes) -> float:
    return float(sum(math.prod(s) * p.element_size() for p, s in shapes.items()))


def _gathered(name: str, scene: Scene, ranks: int) -> float:
    """What fully sharded training holds whole at its fullest moment, in a unit's backward.

    The root's parameters, and four times a unit: its parameters, those of the next one gathered
    ahead, its gradients, and their copy in the order in which they are reduced.
    """
    if name not in SHARDED or ranks == 1:
        return 0.0
    units = [sum(p.numel() for p in unit.parameters()) for _, unit in fsdp.units(scene.model)]
    root = fsdp.root_parameters(scene.model)
    tensor = scene.degrees(name).get("tp", 1)
    return float((root + 4 * max(units, default=0)) * scene.element_bytes / tensor)


def activations(
    name: str, scene: Scene, rank: int, ranks: int, module: nn.Module, knobs: Knobs = NONE
) -> float:
    """What the backward pass keeps on this rank, by one process that runs what the rank runs."""
    axes = scene.degrees(name) if ranks > 1 else {}
    if "pp" in axes:
        return _of_stage(name, scene, rank, module)
    if "cp" in axes:
        return _of_positions(scene, rank, ranks, knobs)
    tensor, by_tokens = axes.get("tp", 1), bool(knobs.get("sequence_parallel"))
    size = -(-scene.batch_size * tensor // ranks) if axes else scene.batch_size
    key = (size, tensor, by_tokens, name == "data_parallel")
    if key not in scene.alive:
        inputs, targets = scene.inputs(size), scene.batch(size)[1]
        prepare: Callable[[nn.Module], None] | None = None
        if tensor > 1:
            prepare = partial(alone.cut_layers, ranks=tensor, sequence_parallel=by_tokens)
        elif name == "data_parallel" and scene.ranks > 1:
            prepare = alone.meet_alone
        scene.alive[key] = _alive(scene.model, inputs, scene, targets, prepare)
    return scene.alive[key]


def _of_stage(name: str, scene: Scene, rank: int, module: nn.Module) -> float:
    """Activations of a pipeline's stage, as often as microbatches are under way in it."""
    axes, place = scene.degrees(name), scene.place(name, rank)["pp"]
    size, tensor = scene.batch_size // axes.get("dp", 1), axes.get("tp", 1)
    count = 1 if name == "model_parallel" else scene.microbatches(size, axes["pp"])
    whole = name == "model_parallel"
    stages = scene.parts(axes["pp"]) if whole else scene.stages(axes["pp"], size // count)
    under_way = min(count, axes["pp"] - place)  # 1f1b
    given = scene.entering(stages, place, size // count)
    targets = scene.batch(size // count)[1] if place == axes["pp"] - 1 else None
    prepare = partial(alone.cut_layers, ranks=tensor) if tensor > 1 else None
    return under_way * _alive(module, given, scene, targets, prepare)


def _of_positions(scene: Scene, rank: int, ranks: int, knobs: Knobs) -> float:
    """Activations of this rank's positions of every sample."""
    method, balance = knobs.get("method", "ring"), knobs.get("balance", "contiguous")
    inputs, targets = scene.batch(scene.batch_size)
    where = positions_of(rank, ranks, inputs.shape[1], balance)
    prepare = partial(
        alone.cut_positions, where=where, rank=rank, ranks=ranks, method=method, balance=balance
    )
    return _alive(scene.model, (inputs[:, where],), scene, targets[:, where], prepare)


def _alive(
    module: nn.Module, inputs: tuple[Any, ...], scene: Scene, targets: Any = None,
    prepare: Callable[[nn.Module], None] | None = None,
) -> float:  # fmt: skip
    """Bytes that one forward pass (and the loss, given `targets`) keeps for backward.

    `prepare` cuts a copy of the module to what one rank has of it.
    """
    copied = copy.deepcopy(module)
    if prepare is not None:
        prepare(copied)

    def step() -> None:
        with torch.random.fork_rng(devices=[]):
            out = call(copied, inputs if len(inputs) > 1 else inputs[0])
            if targets is not None:
                out = scene.work.loss(out, targets)
            _sum(out).backward()

    return float(weigh(step, copied).activations_bytes)


def _sum(value: Any) -> torch.Tensor:
    parts: Iterable[Any] = value if isinstance(value, tuple) else (value,)
    return torch.stack([t.sum() for t in parts if t.requires_grad]).sum()
