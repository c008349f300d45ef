"""Splitting a module's layers over the ranks of a "tp" axis, in place."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from pardemo.strategies import base, routing, tensor_attention, tensor_plans

MOST = 6  # names in a sentence


def slice_layers(
    module: nn.Module, mesh: DeviceMesh, sequence_parallel: bool = False,
    loss_parallel: bool = False, strict: bool = True,
) -> tuple[str, ...]:  # fmt: skip
    """Split every pair of `module` over the 1-D `mesh`; other layers stay whole on every rank.

    `sequence_parallel` also splits what lies between the pairs, along the sequence;
    `loss_parallel` splits the head by vocabulary. Both need a model of `models.GPT`'s make.
    `strict` refuses a module with nothing to split. Returns what a reader should know: which
    layers stayed whole.
    """
    ranks, title = mesh.size(), type(module).__name__
    found = tensor_plans.pairs(module)
    if found or strict:
        tensor_plans.check(found, ranks, title)
    plan: dict[str, ParallelStyle] = {}
    split = Shard(1) if sequence_parallel else Replicate()
    for pair in found:
        _plan_pair(plan, module, pair, split)
    if sequence_parallel:
        _plan_sequence(plan, module)
    if loss_parallel:
        _plan_vocabulary(plan, module, split, ranks)
    _one_seed(module, mesh)
    for pair in found:
        if pair.attention:
            tensor_attention.split(module.get_submodule(pair.attention), mesh)  # type: ignore[arg-type]
    for name, style in plan.items():
        parallelize_module(module.get_submodule(name), mesh, style, src_data_rank=None)
    for pair in found:
        if len(pair.columns) > 1:
            handover = Handover(mesh, split, len(pair.columns))
            for name in pair.columns:
                column = module.get_submodule(name)
                column.register_forward_pre_hook(handover, prepend=True)
    if any(getattr(m, "inplace", False) for m in module.modules()):
        for name in (name for pair in found for name in (*pair.columns, pair.rows)):
            module.get_submodule(name).register_forward_hook(_changeable)
    if loss_parallel and module.config.tied:  # type: ignore[union-attr]
        module.head.weight = module.embed.tok.weight  # type: ignore[union-attr]
    return _kept_whole(module)


def _changeable(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
    """A layer's result that the next may change in place: a DTensor's own part is a view of it."""
    return out if isinstance(out, DTensor) else base.no_view(out)


def _kept_whole(module: nn.Module) -> tuple[str, ...]:
    """A sentence that names the layers of which every rank has all, the largest first."""
    sizes: dict[str, int] = {}
    total = 0
    for name, p in module.named_parameters():
        total += p.numel()
        if not isinstance(p, DTensor) or not any(place.is_shard() for place in p.placements):
            owner = name.rpartition(".")[0] or name
            sizes[owner] = sizes.get(owner, 0) + p.numel()
    if not sizes:
        return ()
    names = sorted(sizes, key=lambda name: -sizes[name])
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return (
        f"{sum(sizes.values()) / total:.0%} of the parameters stay whole on every rank of the "
        f"tensor axis: {', '.join(names[:MOST])}{more}",
    )


def _plan_pair(
    plan: dict[str, ParallelStyle], module: nn.Module, pair: tensor_plans.Pair, split: Any
) -> None:
    given = Replicate() if len(pair.columns) > 1 else split  # several: see Handover
    for name in pair.columns:
        plan[name] = ColwiseParallel(input_layouts=given)
    plan[pair.rows] = RowwiseParallel(output_layouts=split)


class Handover:
    """Columns that take the same input take it once: one sum of its gradient, not one each.

    A hook before each of the `columns`; the layers themselves would each wrap their own copy.
    """

    def __init__(self, mesh: DeviceMesh, split: Any, columns: int) -> None:
        self.mesh, self.split, self.columns = mesh, split, columns
        self.given: Any = None
        self.made: Any = None
        self.uses = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.given is not args[0]:
            self.given, self.uses = args[0], 0
            given = args[0]
            if not isinstance(given, DTensor):
                given = DTensor.from_local(given, self.mesh, [self.split], run_check=False)
            self.made = given.redistribute(placements=[Replicate()])
        made, self.uses = self.made, self.uses + 1
        if self.uses == self.columns:
            self.given = self.made = None
        return (made, *args[1:])


def _plan_sequence(plan: dict[str, ParallelStyle], model: nn.Module) -> None:
    """Norms and residuals on T/t tokens of each sequence; gathered before every pair."""
    _demand_gpt(model, "sequence_parallel")
    blocks = len(model.blocks)  # type: ignore[arg-type]
    plan["embed"] = PrepareModuleOutput(
        output_layouts=(Replicate(),), desired_output_layouts=(Shard(1),)
    )
    for i in range(blocks):
        plan[f"blocks.{i}.norm1"] = SequenceParallel()
        plan[f"blocks.{i}.norm2"] = SequenceParallel()
    plan["norm"] = SequenceParallel()
    plan["head"] = PrepareModuleInput(
        input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),), use_local_output=True
    )


def _plan_vocabulary(
    plan: dict[str, ParallelStyle], model: nn.Module, split: Any, ranks: int
) -> None:
    """The head by vocabulary; a tied embedding likewise, because it is the same parameter."""
    _demand_gpt(model, "loss_parallel")
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr,arg-type]
    if vocabulary % ranks:
        raise base.StrategyError(
            f"loss_parallel: a vocabulary of {vocabulary} does not divide by {ranks} ranks"
        )
    plan["head"] = ColwiseParallel(
        input_layouts=split, output_layouts=Shard(-1), use_local_output=False
    )
    if model.config.tied:  # type: ignore[union-attr]
        plan["embed.tok"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())


def _demand_gpt(model: nn.Module, knob: str) -> None:
    names = ("embed", "blocks", "norm", "head", "config")
    if not all(hasattr(model, name) for name in names):
        raise base.StrategyError(
            f"{knob} needs a model with embed, blocks, norm and head, as models.GPT has; "
            f"{type(model).__name__} has not"
        )
    if layers := routing.seams(model):
        raise base.StrategyError(
            f"{knob} needs blocks that hand on one tensor; those of {type(model).__name__} also "
            f"hand on the balance loss of {len(layers)} layers of experts: leave {knob}=False"
        )


def _one_seed(module: nn.Module, mesh: DeviceMesh) -> None:
    """Whole layers must draw the same dropout on all ranks of the axis, or these drift apart."""
    if not any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.modules()):
        return
    seed = torch.tensor(torch.initial_seed() % 2**31, device=base.this_device(mesh))
    dist.broadcast(seed, group=mesh.get_group(), group_src=0)  # moves 8 bytes
    torch.manual_seed(int(seed))
