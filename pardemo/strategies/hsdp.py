"""Hybrid sharding: fully sharded inside a node, replicated between nodes.

Split      as fsdp, over the S ranks of the axis "shard"; each of the R rows of the axis
           "replicate" holds the whole model once. The batch is split over all R S ranks.
Sent       per rank and microbatch fsdp's (S-1)/S b (2P - P_root) + (S-1)/S b P on the axis "shard",
           and per step one all-reduce of the reduced shard, 2(R-1)/R b P/S, on "replicate": the
           slow links between nodes carry S times less than they would for DDP.
Memory     1/S of parameters, gradients and optimiser state.
Paper      Zhao et al. 2023, "PyTorch FSDP", section 3.2.2; Zhang et al. 2022, "MiCS".
"""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh

from pardemo.strategies import base, sharded


def build(
    model: nn.Module, make_optimizer: base.MakeOptimizer, loss: base.Loss,
    mesh: DeviceMesh | None = None, **knobs: Any,
) -> sharded.Sharded:  # fmt: skip
    """Shard over the axis "shard", replicate over "replicate"; knobs are fsdp's."""
    axes = ["replicate", "shard"]
    return sharded.shard(model, make_optimizer, loss, mesh, axes, sharded.Choices(**knobs))


STRATEGY = base.Strategy(
    name="hsdp",
    title="sharded inside, replicated outside",
    axes=("replicate", "shard"),
    build=build,
    reasons_against=base.too_few_samples,
    knobs=sharded.KNOBS,
    lesson="08_fsdp_and_zero",
)
