"""One way to build tensor parallelism for every strategy with a "tp" axis, alone or with others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import loss_parallel as in_loss_parallel

from pardemo.strategies import base, tensor_plans
from pardemo.strategies.pipeline_split import Chain
from pardemo.strategies.pipeline_trace import Relay
from pardemo.strategies.tensor_slices import slice_layers
from pardemo.strategies.whole import Whole

KNOBS = {
    "sequence_parallel": "keep norms and residuals on 1/t of each sequence (GPT)",
    "loss_parallel": "split the head by vocabulary and never gather the logits (GPT)",
    "clip_grad": "largest global gradient norm",
}


def build(
    model: nn.Module, make_optimizer: base.MakeOptimizer, loss: base.Loss,
    mesh: DeviceMesh | None, *, sequence_parallel: bool = False, loss_parallel: bool = False,
    clip_grad: float | None = None, then: Callable[[nn.Module], Any] | None = None,
) -> base.Step:  # fmt: skip
    """Slice `model` over the mesh's "tp" axis, replicated over its "dp" axis where there is one.

    `then(model)` goes on slicing over another axis. One rank on "tp": nothing is sliced.
    """
    ranks = base.axis(mesh, "tp").size

    notes: tuple[str, ...] = ()

    def slice_modules(module: nn.Module) -> None:
        nonlocal notes
        if ranks > 1:
            assert mesh is not None
            notes = slice_layers(module, mesh["tp"], sequence_parallel, loss_parallel)
        if then is not None:
            then(module)

    split_loss = loss_parallel and ranks > 1
    context = in_loss_parallel if split_loss else contextlib.nullcontext
    shards = then is not None
    step = Whole(model, make_optimizer, loss, mesh, clip_grad, slice_modules, context, shards)
    step.notes = notes
    return step


def stage_slicer(mesh: DeviceMesh | None) -> Callable[[nn.Module], Any] | None:
    """What slices each stage of a pipeline over the mesh's "tp" axis; None at degree 1."""
    if mesh is None or base.axis(mesh, "tp").size == 1:
        return None

    def slice_stage(stage: nn.Module) -> Sequence[str]:
        if isinstance(stage, Relay):
            raise base.StrategyError(
                "layers of a traced model cannot be split: give the model `sequence()`"
            )
        if not isinstance(stage, Chain):  # the whole model: one stage
            return slice_layers(stage, mesh["tp"])
        notes = slice_layers(nn.Sequential(*stage.parts), mesh["tp"], strict=False)
        names = ", ".join(str(name) for name in stage.names)  # type: ignore[union-attr]
        return [f"of the pieces {names}, numbered from 0, {note}" for note in notes]

    return slice_stage


def reasons_against(model: nn.Module, world_size: int, batch_size: int) -> list[str]:
    """Why `model` cannot be sliced over `world_size` ranks."""
    if world_size == 1:
        return []
    try:
        tensor_plans.check(tensor_plans.pairs(model), world_size, type(model).__name__)
    except base.StrategyError as error:
        return [str(error)]
    return []


def reasons_on_mesh(axes: tuple[str, ...]) -> Callable[[nn.Module, int, int], list[str]]:
    """The same for a mesh with these axes, of which "tp" gets its share of the ranks."""

    def against(model: nn.Module, world_size: int, batch_size: int) -> list[str]:
        degrees = dict(zip(axes, base.factor(world_size, len(axes)), strict=True))
        replicas = degrees.get("dp", 1)
        few = base.too_few_samples(model, replicas, batch_size)
        return few + reasons_against(model, degrees["tp"], batch_size)

    return against
