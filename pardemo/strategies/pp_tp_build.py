"""Pipelines whose stages are sliced: what tp_pp and dp_pp_tp share."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh

from pardemo.strategies import base, pipeline_build, pipeline_split, tensor_build


def build(
    model: nn.Module, make_optimizer: base.MakeOptimizer, loss: base.Loss,
    mesh: DeviceMesh | None, **knobs: Any,
) -> base.Step:  # fmt: skip
    """Cut over "pp", slice each stage over "tp", replicate over "dp"; knobs are the pipeline's."""
    prepare = tensor_build.stage_slicer(mesh)
    return pipeline_build.build(model, make_optimizer, loss, mesh, prepare=prepare, **knobs)


def reasons(axes: tuple[str, ...]) -> Any:
    """`reasons_against` for a mesh with these axes."""
    pipeline, tensor = pipeline_build.reasons_on_mesh(axes), tensor_build.reasons_on_mesh(axes)

    def reasons_against(model: nn.Module, world_size: int, batch_size: int) -> list[str]:
        found = pipeline(model, world_size, batch_size) + tensor(model, world_size, batch_size)
        degrees = dict(zip(axes, base.factor(world_size, len(axes)), strict=True))
        both = degrees["pp"] > 1 and degrees["tp"] > 1  # one stage is the whole model, not traced
        if both and not pipeline_split.is_sequence(model):
            found.append("stages of a traced model cannot be sliced: give it `sequence()`")
        return found

    return reasons_against
