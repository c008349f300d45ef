"""Fully sharded data parallelism (FSDP2, also called ZeRO-3): nobody keeps the whole model.

Split      parameters, gradients and optimiser state: of every tensor, 1/N of dim 0 per rank. The
           batch too.
Sent       a unit (a block) is gathered before its forward, freed, gathered again before its
           backward; its gradients are reduce-scattered. The root unit is gathered once. Per rank
           and microbatch (N-1)/N b (2P - P_root) of all-gathers, and (N-1)/N b P of
           reduce-scatters per step. Dims that N does not divide are padded. gloo carries out
           reduce-scatter as an all-reduce: there those bytes are twice the textbook's.
Memory     1/N of parameters, gradients and optimiser state; the root and the largest one or two
           units whole, while they are used.
Paper      Rajbhandari et al. 2020, "ZeRO", section 5; Zhao et al. 2023, "PyTorch FSDP".
"""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh

from pardemo.strategies import base, sharded
from pardemo.strategies.units import find as units
from pardemo.strategies.units import root_parameters

__all__ = ["STRATEGY", "build", "root_parameters", "units"]


def build(
    model: nn.Module, make_optimizer: base.MakeOptimizer, loss: base.Loss,
    mesh: DeviceMesh | None = None, **knobs: Any,
) -> sharded.Sharded:  # fmt: skip
    """Shard `model` over the axis "dp"; `knobs` are those of `sharded.Choices`."""
    return sharded.shard(model, make_optimizer, loss, mesh, ["dp"], sharded.Choices(**knobs))


STRATEGY = base.Strategy(
    name="fsdp",
    title="fully sharded data parallel",
    axes=("dp",),
    build=build,
    reasons_against=base.too_few_samples,
    knobs=sharded.KNOBS,
    lesson="08_fsdp_and_zero",
)
