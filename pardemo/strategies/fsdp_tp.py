"""FSDP outside, tensor parallel inside: a 2-D mesh ("dp", "tp").

Split      layers over the t ranks of a row (see tensor.py), the batch and what is left of every
           parameter over the d rows: a rank keeps 1/(dt) of a sliced layer, 1/d of a whole one.
Sent       tensor's all-reduces over "tp"; over "dp" all-gathers (d-1)/d (2P' - P'_root) b and
           a reduce-scatter (d-1)/d P' b (twice that on gloo), P' as one rank of "tp" held it.
Memory     (P/t + whole layers)/d of parameters, gradients and optimiser state.
Papers     Zhao 2023 (FSDP); Shoeybi 2019; the 2-D layout as in TorchTitan (Liang 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from pardemo.strategies import base, tensor_build, units


def build(
    model: nn.Module, make_optimizer: base.MakeOptimizer, loss: base.Loss,
    mesh: DeviceMesh | None, *, sequence_parallel: bool = False, loss_parallel: bool = False,
    clip_grad: float | None = None, reshard_after_forward: bool = True,
    units: Sequence[str] | None = None,
) -> base.Step:  # fmt: skip
    """Slice over "tp", then shard every unit (and the rest as one) over "dp"."""
    then = None
    if base.axis(mesh, "dp").size > 1:
        then = partial(_shard, mesh=mesh, names=units, reshard=reshard_after_forward)
    return tensor_build.build(
        model, make_optimizer, loss, mesh, sequence_parallel=sequence_parallel,
        loss_parallel=loss_parallel, clip_grad=clip_grad, then=then,
    )  # fmt: skip


def _shard(model: nn.Module, mesh: Any, names: Sequence[str] | None, reshard: bool) -> None:
    for _, unit in units.find(model, names):
        fully_shard(unit, mesh=mesh["dp"], reshard_after_forward=reshard)
        units.take_no_views(unit)
    fully_shard(model, mesh=mesh["dp"], reshard_after_forward=reshard)


STRATEGY = base.Strategy(
    name="fsdp_tp",
    title="FSDP x tensor parallel",
    axes=("dp", "tp"),
    build=build,
    reasons_against=tensor_build.reasons_on_mesh(("dp", "tp")),
    knobs={
        **tensor_build.KNOBS,
        "reshard_after_forward": "free a unit's parameters after its forward",
        "units": "names of the modules to gather one at a time (None: found by themselves)",
    },
    lesson="10_combining",
)
