"""One workload on so many ranks: the facts about its model that closed forms are fed with.

Nothing here runs a rank. Shapes of what crosses a cut are read from one forward pass here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

from pardemo import strategies
from pardemo.predict.sent import Message, message
from pardemo.strategies import (
    base,
    model_parallel,
    pipeline_costs,
    pipeline_plan,
    pipeline_split,
    pipeline_trace,
    routing,
    tensor_plans,
)
from pardemo.workloads import Workload

Axes = dict[str, int]  # name of a mesh axis -> its degree, or this rank's place on it


@dataclass(frozen=True)
class Scene:
    """One workload on `ranks` ranks with a global batch; `backend` says what carries the data."""

    work: Workload
    ranks: int
    batch_size: int
    backend: str = "gloo"

    @cached_property
    def model(self) -> nn.Module:
        """The model, built once; only its shapes are read."""
        return self.work.make_model(0)

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, a tied one once."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def elements(self) -> int:
        """P: elements of all trainable parameters."""
        return sum(p.numel() for p in self.parameters)

    @property
    def frozen(self) -> int:
        """Elements of parameters that are not trained."""
        return sum(p.numel() for p in self.model.parameters()) - self.elements

    @property
    def element_bytes(self) -> int:
        """b: bytes of one element."""
        return self.parameters[0].element_size()

    @property
    def implementation(self) -> str:
        """How this backend carries out a reduce-scatter."""
        return "gloo" if self.backend == "gloo" else "textbook"

    def degrees(self, name: str) -> Axes:
        """How `name` factors these ranks over its mesh axes."""
        row = strategies.get(name)
        return dict(zip(row.axes, row.shape(self.ranks), strict=True)) if row.axes else {}

    def place(self, name: str, rank: int) -> Axes:
        """Where `rank` stands on each axis of that mesh, the last axis running fastest."""
        found: Axes = {}
        for axis, size in reversed(self.degrees(name).items()):
            rank, found[axis] = divmod(rank, size)
        return found

    def batch(self, size: int) -> Any:
        """A batch of `size` samples on the CPU."""
        device = next(self.model.parameters()).device
        return base.to_device(self.work.make_batch(size, 0, 0), device)

    def inputs(self, size: int) -> tuple[Any, ...]:
        """The model's positional arguments for `size` samples."""
        given = self.batch(size)[0]
        return given if isinstance(given, tuple) else (given,)

    def microbatches(self, size: int, stages: int) -> int:
        """Into how many parts a pipeline of so many stages will cut `size` samples."""
        plan = pipeline_plan.Plan.for_model(
            self.model, None, None, None, None, "parameters", "refuse"
        )
        return plan.count(size, stages)

    @cached_property
    def idle(self) -> set[nn.Parameter]:
        """Trainable parameters whose gradient is zero, or missing, on this batch in one process."""
        copied = copy.deepcopy(self.model)
        inputs, targets = self.batch(self.batch_size)
        with torch.random.fork_rng(devices=[]):
            loss = self.work.loss(base.call(copied, inputs), targets)
        if loss.requires_grad:
            loss.backward()
        both = zip(self.model.parameters(), copied.parameters(), strict=True)
        return {p for p, q in both if p.requires_grad and (q.grad is None or not q.grad.any())}

    @cached_property
    def alive(self) -> dict[Any, float]:
        """Bytes of activations by samples and how the layers are cut, once they were weighed."""
        return {}

    @cached_property
    def _cuts(self) -> dict[Any, list[nn.Module]]:
        return {}

    def stages(self, count: int, size: int = 0) -> list[nn.Module]:
        """The pipeline's stages, balanced by parameters; traced ones serve `size` samples only."""
        size = 0 if pipeline_split.is_sequence(self.model) else size or self.batch_size
        if (count, size) not in self._cuts:
            if not size:
                made = pipeline_split.chains(self.model, count, None, None)
            else:
                given, model = self.inputs(size), copy.deepcopy(self.model)
                costs = pipeline_costs.costs(model, given, "parameters")
                made = pipeline_trace.traced(model, count, None, given, costs)
            self._cuts[count, size] = made
        return self._cuts[count, size]

    def parts(self, count: int) -> list[nn.Module]:
        """The parts of naive model parallelism; without a sequence they are a pipeline's."""
        if not pipeline_split.is_sequence(self.model):
            return self.stages(count)
        cut = model_parallel.cut_model(self.model, count, None, None)
        return [pipeline_split.Chain(part) for part in cut]

    def boundaries(self, stages: Sequence[nn.Module], size: int) -> list[tuple[float, float]]:
        """Bytes that cross each boundary for `size` samples: activations, and their gradients."""
        edges = pipeline_split.Edges(stages).edges(self.inputs(size))[1:-1]
        each = [[(t.numel() * t.element_size(), t.requires_grad) for t in edge] for edge in edges]
        return [(float(sum(b for b, _ in at)), float(sum(b for b, g in at if g))) for at in each]

    def entering(self, stages: Sequence[nn.Module], index: int, size: int) -> tuple[Any, ...]:
        """What stage `index` is given for `size` samples; gradients are asked of what crossed."""
        if index == 0:
            return self.inputs(size)
        edge = pipeline_split.Edges(stages).edges(self.inputs(size))[index]
        return tuple(
            torch.zeros(tuple(t.shape), dtype=t.dtype, requires_grad=t.requires_grad) for t in edge
        )


def output_of(scene: Scene, inputs: Any) -> Any:
    """What the whole model returns for these inputs."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return base.call(scene.model, inputs)


def shared(stages: Sequence[nn.Module]) -> list[tuple[float, list[int]]]:
    """(bytes, stages) of every trainable parameter that several stages use."""
    owners: dict[nn.Parameter, list[int]] = {}
    for number, stage in enumerate(stages):
        for p in dict.fromkeys(stage.parameters()):
            owners.setdefault(p, []).append(number)
    return [
        (p.numel() * p.element_size(), at)
        for p, at in owners.items() if len(at) > 1 and p.requires_grad
    ]  # fmt: skip


def batchnorm(module: nn.Module, axes: Axes, times: int = 1) -> list[Message]:
    """Synchronised BatchNorm on each of `axes`: 2C+1 doubles forward, 2C values backward."""
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    sizes = {
        "forward": sum(8 * (2 * m.num_features + 1) for m in layers),
        "backward": sum(2 * m.num_features * _width(m) for m in layers),
    }
    return [
        message("all_reduce", axis, size, times * sizes[way], "2(n-1)/n statistics of BatchNorm",
                times * len(layers), phase=way)
        for axis, size in axes.items() for way in sizes if layers and size > 1
    ]  # fmt: skip


def _width(module: nn.Module) -> int:
    return next((p.element_size() for p in module.parameters()), 4)


def choices(module: nn.Module, axis: str, ranks: int) -> list[Message]:
    """A mixture of experts counts over all ranks: E integers of each, gathered in forward."""
    layers = routing.seams(module)
    payload = sum(8 * len(layer.experts) * ranks for layer in layers)
    text = "(n-1)/n choices per expert"
    told = message("all_gather", axis, ranks, payload, text, len(layers), phase="forward")
    return [told] if layers and ranks > 1 else []


@dataclass(frozen=True)
class Pairs:
    """All-reduces of a module's column/row pairs in one forward and backward: calls and bytes."""

    calls: dict[str, int]
    sizes: dict[str, float]

    def messages(self, ranks: int, times: int = 1) -> list[Message]:
        """What one rank of the "tp" axis sends when this runs `times` per step."""
        what = {"forward": "the rows' outputs", "backward": "the gradients of the columns' inputs"}
        return [
            message("all_reduce", "tp", ranks, times * self.sizes[way],
                    f"2(t-1)/t m x {what[way]}", times * self.calls[way], phase=way)
            for way in what if self.calls[way]
        ]  # fmt: skip


def pairs(module: nn.Module, inputs: tuple[Any, ...], routed: Sequence[int] = ()) -> Pairs:
    """Sizes of what is summed around every pair, from one forward pass of the whole module.

    `routed` are the rows that each mixture of experts took; without it, those of this pass.
    """
    body = nn.Sequential(*module.parts) if isinstance(module, pipeline_split.Chain) else module
    calls, sizes = {"forward": 0, "backward": 0}, {"forward": 0.0, "backward": 0.0}
    handles, known = [], dict(zip(routing.seams(body), routed, strict=False))

    def note(way: str, tensor: torch.Tensor, rows: int | None) -> None:
        share = 1.0 if rows is None else rows
        width = tensor.numel() if rows is None else tensor.shape[-1]
        calls[way] += 1
        sizes[way] += share * width * tensor.element_size()

    found = tensor_plans.pairs(body)
    for pair in found:
        layer = next((m for m in known if _inside(m, body.get_submodule(pair.rows))), None)
        if layer is not None and pair.rows != _first(layer, body, found):
            continue  # the rows of all experts together are counted with the first of them
        rows = None if layer is None else known[layer]

        def after(_: Any, __: Any, out: Any, rows: int | None = rows) -> None:
            note("forward", out[0] if isinstance(out, tuple) else out, rows)

        def before(_: Any, args: Any, rows: int | None = rows) -> None:
            for given in {id(x): x for x in args[:3]}.values():  # query, key, value may be one
                if given.requires_grad:
                    note("backward", given, rows)

        ends = (pair.attention or pair.rows, pair.attention or pair.columns[0])
        handles.append(body.get_submodule(ends[0]).register_forward_hook(after))
        handles.append(body.get_submodule(ends[1]).register_forward_pre_hook(before))
    try:
        with torch.random.fork_rng(devices=[]):
            base.call(module, inputs if len(inputs) > 1 else inputs[0])
    finally:
        for handle in handles:
            handle.remove()
    return Pairs(calls, sizes)


def _inside(layer: nn.Module, module: nn.Module) -> bool:
    return any(module is m for m in layer.experts.modules())  # type: ignore[union-attr]


def _first(layer: nn.Module, body: nn.Module, found: Iterable[tensor_plans.Pair]) -> str:
    return next(p.rows for p in found if _inside(layer, body.get_submodule(p.rows)))


def slices(module: nn.Module, ranks: int) -> dict[nn.Parameter, tuple[int, ...]]:
    """The shape of every parameter that one of `ranks` tensor-parallel ranks holds."""
    body = nn.Sequential(*module.parts) if isinstance(module, pipeline_split.Chain) else module
    held = {p: tuple(p.shape) for p in body.parameters()}
    for pair in tensor_plans.pairs(body) if ranks > 1 else ():
        for name in pair.columns:
            for p in body.get_submodule(name).parameters():
                held[p] = (p.shape[0] // ranks, *p.shape[1:])
        if pair.attention:
            for p in body.get_submodule(pair.attention).parameters(recurse=False):
                held[p] = (p.shape[0] // ranks, *p.shape[1:])
        weight: Any = body.get_submodule(pair.rows).weight
        held[weight] = (weight.shape[0], weight.shape[1] // ranks)
    return held


def held_bytes(shapes: dict[nn.Parameter, tuple[int, ...]]) -> int:
    """Bytes of the trainable ones among them: what a sum over replicas carries."""
    return sum(math.prod(s) * p.element_size() for p, s in shapes.items() if p.requires_grad)
