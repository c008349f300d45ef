"""Wrapping a model in DistributedDataParallel: what ddp and zero1 share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from pardemo.strategies import base, batchnorm, routing


def prepare(
    model: nn.Module, place: base.Axis, device: torch.device, sync_batchnorm: bool = True
) -> nn.Module:
    """The model on its device; batch norm and experts look at the batch of all ranks."""
    model = model.to(device)
    if sync_batchnorm:
        model = batchnorm.synchronise(model, place.group, device)
    routing.synchronise(model, place.group)
    return model


def wrap(
    model: nn.Module, place: base.Axis, device: torch.device, sync_batchnorm: bool = True,
    **options: Any,
) -> nn.Module:  # fmt: skip
    """`model` in DDP over `place`, which broadcasts rank 0's parameters and buffers."""
    if place.group is None:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        process_group=place.group,
        forward_sync_buffers=not sync_batchnorm,  # synchronised, they cannot differ
        **options,
    )


def sending(model: nn.Module, yes: bool) -> contextlib.AbstractContextManager[None]:
    """no_sync for a microbatch whose gradients stay here for now."""
    if yes or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def refuse_unused(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """After a backward pass that sent: raise StrategyError when a parameter got no gradient.

    DDP then waits with that parameter's bucket, whose other gradients stay this rank's own, and
    says so only in the next forward. `parameters` are all of the model's, listed once: to walk its
    modules in every step takes longer than to look at the gradients.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    if model.find_unused_parameters or model.static_graph:
        return
    if any(p.grad is None and p.requires_grad for p in parameters):
        named = model.module.named_parameters()
        lost = [name for name, p in named if p.requires_grad and p.grad is None]
        few = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        raise base.StrategyError(
            f"{few} took no part in the loss, and DDP waits for every gradient: pass "
            "find_unused_parameters=True, or freeze (requires_grad_(False)) what is not used"
        )
