"""One way to build a pipeline for every strategy with a "pp" axis, alone or with others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh

from pardemo.strategies import base, pipeline_split
from pardemo.strategies.pipeline_plan import Plan
from pardemo.strategies.pipeline_run import Pipeline, Prepare
from pardemo.strategies.whole import Whole

KNOBS = {
    "schedule": "gpipe, 1f1b, interleaved1f1b, interleaved_zero_bubble, zbv, dualpipev, loopedbfs",
    "microbatches": "equal parts of the batch under way (None: about twice the stages)",
    "virtual": "stages per rank (None: 1, or 2 where the schedule interleaves)",
    "cut": "names of the pieces at which stages 1, 2, ... start (None: balanced)",
    "balance": '"parameters", "measured" seconds, or one cost per piece',
    "batchnorm": '"refuse", or accept statistics "per_microbatch"',
    "clip_grad": "largest global gradient norm",
}


def build(
    model: nn.Module, make_optimizer: base.MakeOptimizer, loss: base.Loss,
    mesh: DeviceMesh | None, *, schedule: str | None = None, microbatches: int | None = None,
    virtual: int | None = None, cut: Sequence[str] | None = None,
    balance: str | Sequence[float] = "parameters", batchnorm: str = "refuse",
    clip_grad: float | None = None, prepare: Prepare | None = None,
) -> base.Step:  # fmt: skip
    """A pipeline over the mesh's "pp" axis, replicated over its "dp" axis where there is one.

    `prepare(stage)` slices each stage over further axes. One stage is the whole model: no pipeline.
    """
    ranks = base.axis(mesh, "pp").size
    plan = Plan.for_model(model, schedule, microbatches, virtual, cut, balance, batchnorm)
    if ranks == 1:
        return Whole(model, make_optimizer, loss, mesh, clip_grad, prepare)
    return Pipeline(model, make_optimizer, loss, mesh, plan, clip_grad, prepare)


def reasons_against(model: nn.Module, world_size: int, batch_size: int) -> list[str]:
    """Why `model` cannot be a pipeline of `world_size` stages with batches of `batch_size`."""
    reasons: list[Any] = []
    found = len(pipeline_split.places(model))
    if found < world_size:
        reasons.append(f"{found} pieces cannot make {world_size} stages")
    if batch_size < world_size:
        reasons.append(f"a batch of {batch_size} has fewer microbatches than {world_size} stages")
    return reasons


def reasons_on_mesh(axes: tuple[str, ...]) -> Callable[[nn.Module, int, int], list[str]]:
    """The same for a mesh with these axes, of which "pp" gets its share of the ranks."""

    def against(model: nn.Module, world_size: int, batch_size: int) -> list[str]:
        degrees = dict(zip(axes, base.factor(world_size, len(axes)), strict=True))
        replicas = degrees.get("dp", 1)
        if batch_size % replicas:
            return [f"a batch of {batch_size} cannot be cut equally over {replicas} pipelines"]
        return reasons_against(model, degrees["pp"], batch_size // replicas)

    return against
