"""Memory per rank by formula: every state to the byte, activations from one process's own.

States follow from which tensors a rank holds: parameters b P, gradients b P of the trainable ones,
the optimiser's two or one values each, buffers. Activations are those of one process that runs
what the rank runs (its share of the samples, its stage), as often as that is in flight.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn

from pardemo.measure import weigh
from pardemo.predict.strategy_memory import OPTIMIZER_STATES, peak_bytes
from pardemo.strategies import fsdp, routing
from pardemo.strategies.base import call

from . import scene as facts
from .scene import Scene

KINDS = ("parameters", "gradients", "optimizer", "buffers", "activations")
SHARDED = ("fsdp", "hsdp", "fsdp_tp")
STAY = ("ddp", "zero1", "pipeline", "dp_pp", "tp_pp", "dp_pp_tp")  # gradients beside activations
Shapes = dict[nn.Parameter, tuple[int, ...]]


def forecast(name: str, scene: Scene, rank: int, ranks: int) -> dict[str, Any]:
    """`memory_formula`: bytes of every kind on `rank`, and of the peak; empty where unknown."""
    kind = _optimizer(scene)
    if kind is None:
        return {}
    shapes, module = held(name, scene, rank if ranks > 1 else 0, ranks)
    trained = {p: s for p, s in shapes.items() if p.requires_grad}
    found = {
        "parameters_bytes": _bytes(shapes),
        "gradients_bytes": _bytes(trained),
        "optimizer_bytes": _states(kind, _owned(name, shapes, rank, ranks)),
        "buffers_bytes": float(sum(b.numel() * b.element_size() for b in module.buffers())),
    }
    alive = activations(name, scene, rank, ranks, module)
    if alive is not None:
        found["activations_bytes"] = alive
        gathered = _gathered(name, scene, ranks)
        found["peak_bytes"] = peak_bytes(
            **found, gathered_bytes=gathered, gradients_stay=name in STAY and ranks > 1
        )
    return {"memory_formula": found}


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
    loads, owned = [0] * ranks, {}
    for p, shape in sorted(shapes.items(), key=lambda item: -math.prod(item[1])):
        owner = loads.index(min(loads))
        loads[owner] += math.prod(shape)
        if p.requires_grad and (name != "zero1" or owner == rank):
            owned[p] = shape
    return owned


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


def activations(name: str, scene: Scene, rank: int, ranks: int, module: nn.Module) -> float | None:
    """What the backward pass keeps on this rank; None where one process has no like of it."""
    axes = scene.degrees(name) if ranks > 1 else {}
    if "tp" in axes or "cp" in axes or (name == "expert" and ranks > 1):
        return None  # the layers' insides are cut, which no single process runs
    if "pp" not in axes:
        size = -(-scene.batch_size // ranks) if axes else scene.batch_size
        if size not in scene.alive:
            scene.alive[size] = _alive(scene.model, scene.inputs(size), scene, size)
        return scene.alive[size]
    place, size = scene.place(name, rank)["pp"], scene.batch_size // axes.get("dp", 1)
    count = 1 if name == "model_parallel" else scene.microbatches(size, axes["pp"])
    stages = scene.parts(ranks) if name == "model_parallel" else scene.stages(axes["pp"])
    under_way = min(count, axes["pp"] - place)  # 1f1b
    given = scene.entering(stages, place, size // count)
    last = place == axes["pp"] - 1
    return under_way * _alive(module, given, scene, size // count if last else 0)


def _alive(module: nn.Module, inputs: tuple[Any, ...], scene: Scene, targets: int) -> float:
    """Bytes that one forward pass (and the loss of `targets` samples) keeps for backward."""
    copied = copy.deepcopy(module)

    def step() -> None:
        with torch.random.fork_rng(devices=[]):
            out = call(copied, inputs if len(inputs) > 1 else inputs[0])
            if targets:
                out = scene.work.loss(out, scene.batch(targets)[1])
            _sum(out).backward()

    return float(weigh(step, copied).activations_bytes)


def _sum(value: Any) -> torch.Tensor:
    parts: Iterable[Any] = value if isinstance(value, tuple) else (value,)
    return torch.stack([t.sum() for t in parts if t.requires_grad]).sum()
