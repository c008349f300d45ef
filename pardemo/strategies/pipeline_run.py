"""The engine of every strategy with a "pp" axis: stages of this rank, schedule, ties, state.

torch.distributed.pipelining moves the microbatches; here is what it leaves to its user: cutting,
equal shapes, parameters that two stages share, the data-parallel sum, one loss for all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage

from pardemo.strategies import (
    base,
    batchnorm,
    parts,
    pipeline_costs,
    pipeline_split,
    pipeline_trace,
    routing,
)
from pardemo.strategies.pipeline_plan import ONE_STAGE, SCHEDULES, Plan

Prepare = Callable[[nn.Module], Any]


class Pipeline(base.Step):
    """The stages of this rank and the schedule that drives them.

    `prepare(stage)` may change each stage in place (tensor parallelism does). Within the pipeline
    every rank of `axis` holds other stages; ranks of `replicas` hold the same and share the batch.
    """

    def __init__(
        self, model: nn.Module, make_optimizer: base.MakeOptimizer, loss: base.Loss,
        mesh: DeviceMesh | None, plan: Plan, clip_grad: float | None,
        prepare: Prepare | None = None,
    ) -> None:  # fmt: skip
        self.mesh = mesh
        self.axis, self.replicas = base.axis(mesh, "pp"), base.axis(mesh, "dp")
        self.device, self.loss, self.plan = base.this_device(mesh), loss, plan
        self.make_optimizer, self.prepare, self.clip_grad = make_optimizer, prepare, clip_grad
        self.stages = self.axis.size * plan.stages_per_rank()
        model = model.to(self.device)
        parts.agree(model, mesh)
        self.keys, self.title = list(model.state_dict()), type(model).__name__
        self.traced_for: Any = None
        self.shapes: Any = None  # what the schedule was made for
        self.schedule: Any = None
        self.ties: list[Tie] = []
        where = pipeline_split.places(model)
        pipeline_split.ranges(where, self.stages, plan.cut, None)  # refuse early
        super().__init__(model)
        self.held = parts.slots(model)
        self.whole = True  # not yet cut: all of the model is here
        if pipeline_split.is_sequence(model) and plan.balance != "measured":
            costs = None if isinstance(plan.balance, str) else plan.balance
            self._keep(pipeline_split.chains(model, self.stages, plan.cut, costs))

    def step(self, batch: Any) -> torch.Tensor:
        """One optimiser step: microbatches through the stages, ties and replicas summed."""
        (inputs, targets), _ = base.take_shard(batch, self.replicas.rank, self.replicas.size)
        every = base.samples(batch)
        if every % self.replicas.size:
            raise base.StrategyError(
                f"a batch of {every} cannot be cut equally over {self.replicas.size} pipelines"
            )
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        if not all(isinstance(t, torch.Tensor) for t in (*args, targets)):
            kinds = ", ".join(type(t).__name__ for t in args)
            raise base.StrategyError(
                "a pipeline takes a tensor, or a tuple of tensors in forward's order, as inputs, "
                f"and one tensor as target; got {kinds} as inputs and {type(targets).__name__} as "
                "target"
            )
        args, targets = base.to_device((args, targets), self.device)
        count = self.plan.count(base.samples(args), self.axis.size)
        self._make_schedule(args, targets, count)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = self._run(args, targets)
        for tie in self.ties:
            tie.add_gradients()
        if self.replicas.group is not None:
            parts.add_gradients(self.parameters(), self.replicas.group)
        copies = [tie.tensor() for tie in self.ties if tie.ranks[0] != self.axis.rank]
        parts.clip(self.parameters(), self.clip_grad, self.axis.group, copies)
        for optimizer in self.optimizers:
            optimizer.step()
        return base.reduce_sum(loss, self.replicas.group)

    def parameters(self) -> list[torch.Tensor]:
        """This rank's parameters, each once."""
        return list(self.model.parameters())

    def state(self) -> base.State:
        """Gather every stage's tensors under the original names (call on every rank)."""
        mine = parts.read(self.held)
        return parts.gather(mine, None if self.whole else self.axis.group, self.keys)

    def load(self, state: base.State) -> None:
        """Each rank copies what its stages hold."""
        parts.write(self.held, state)

    def _make_schedule(self, args: tuple[Any, ...], targets: torch.Tensor, count: int) -> None:
        """A schedule for batches of these shapes; a new shape replaces the one there is."""
        shapes = (count, *((t.shape, t.dtype) for t in (*args, targets)))
        if shapes == self.shapes:
            return
        micro = base.take_shard(args, 0, count)[0]
        if self.whole:
            self._cut(micro)
        if self.traced_for not in (None, _shapes(micro)):
            raise base.StrategyError(
                f"{self.title} was traced for microbatches of {self.traced_for} and cannot run "
                f"{_shapes(micro)}: keep the batch's shape, or give the model `sequence()`"
            )
        self.edges = self.cut.edges(micro)
        plan, last = self.plan, self.stages - 1
        stages = [
            PipelineStage(
                stage, i, self.stages, self.device,
                input_args=self.edges[i], output_args=self.edges[i + 1], group=self.axis.group,
            )
            for i, stage in self.mine.items()
        ]  # fmt: skip
        loss, shares = self.loss, count * self.replicas.size
        self.schedule = SCHEDULES[plan.schedule](
            stages[0] if plan.schedule in ONE_STAGE else stages,
            count,
            loss_fn=lambda output, target: loss(output, target) / shares,
            scale_grads=False,  # torch would divide a parameter shared by two stages twice
        )
        self.shapes, self.first, self.last = shapes, 0 in self.mine, last in self.mine

    def _run(self, args: tuple[Any, ...], targets: torch.Tensor) -> torch.Tensor:
        """Drive the schedule once; the mean loss, sent from the last stage to all."""
        losses: list[torch.Tensor] = []
        given = {"target": targets, "losses": losses} if self.last else {}
        inputs = args if self.first else ()
        self.schedule.step(*inputs, **given, return_outputs=False)  # sends A per microbatch and way
        loss = torch.zeros((), device=self.device, dtype=torch.float64)
        if self.last:
            loss = torch.stack([value.detach() for value in losses]).sum().double()
        source = self.plan.owner(self.stages - 1, self.axis.size)
        dist.broadcast(loss, group=self.axis.group, group_src=source)  # moves 8 bytes
        return loss

    def _cut(self, micro: tuple[Any, ...]) -> None:
        """Cut a model that could not be cut before a microbatch was seen."""
        if not pipeline_split.is_sequence(self.model):
            if self.replicas.size > 1 and batchnorm.has_batchnorm(self.model):
                raise base.StrategyError(
                    f"{self.title} is traced, so its BatchNorm cannot look at all "
                    f"{self.replicas.size} pipelines: give the model `sequence()`"
                )
            costs = self._costs(micro)
            stages = pipeline_trace.traced(self.model, self.stages, self.plan.cut, micro, costs)
            self._keep(stages)
            self.traced_for = _shapes(micro)
            return
        costs = self._costs(micro)
        self._keep(pipeline_split.chains(self.model, self.stages, self.plan.cut, costs))

    def _costs(self, micro: tuple[Any, ...]) -> Any:
        """One cost per piece; seconds are the first rank's, so that every rank cuts alike."""
        costs: list[Any] = [pipeline_costs.costs(self.model, micro, self.plan.balance)]
        for group in (self.axis.group, self.replicas.group):
            if group is not None and self.plan.balance == "measured":
                dist.broadcast_object_list(costs, group=group, group_src=0)  # a few numbers
        return costs[0]

    def _keep(self, stages: list[nn.Module]) -> None:
        """Keep this rank's stages, find the tensors it shares with others, let go of the rest."""
        owners = [self.plan.owner(i, self.axis.size) for i in range(self.stages)]
        _refuse_shared_buffers(stages, owners)
        mine = [i for i in range(self.stages) if owners[i] == self.axis.rank]
        self.cut = pipeline_split.Edges(stages)
        used = parts.slots(self.model, stages)
        idle = {k: slot for k, slot in parts.slots(self.model).items() if k not in used}
        self.held = parts.slots(self.model, [stages[i] for i in mine]) | idle
        self.ties = find_ties(stages, owners, self.held, self.mesh)
        for i in mine:  # a BatchNorm sees its whole microbatch, over all pipelines
            stages[i] = batchnorm.synchronise(stages[i], self.replicas.group, self.device)
            routing.synchronise(stages[i], self.replicas.group)
        self.mine = {i: stages[i].to(self.device) for i in mine}
        self.model, self.whole = nn.ModuleDict({str(i): s for i, s in self.mine.items()}), False
        if self.prepare is not None:
            for stage in self.mine.values():
                self.notes += tuple(self.prepare(stage) or ())
        self.optimizers = parts.optimizers(self.parameters(), self.make_optimizer)


def _shapes(tensors: tuple[torch.Tensor, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(t.shape) for t in tensors)


class Tie:
    """A parameter that stages on several ranks use: each holds a copy, gradients are summed."""

    def __init__(self, ranks: list[int], slot: parts.Slot, group: dist.ProcessGroup) -> None:
        self.ranks, self.slot, self.group = ranks, slot, group

    def tensor(self) -> torch.Tensor:
        """This rank's copy."""
        return getattr(*self.slot)

    def add_gradients(self) -> None:
        """Sum the copies' gradients, so that all copies take the same step and never drift."""
        tensor = self.tensor()
        if not tensor.requires_grad:
            return
        if tensor.grad is None:
            tensor.grad = torch.zeros_like(tensor)
        dist.all_reduce(parts.local(tensor.grad), group=self.group)  # moves 2(k-1)/k * its bytes


def find_ties(
    stages: list[nn.Module], owners: list[int], held: dict[str, parts.Slot],
    mesh: DeviceMesh | None,
) -> list[Tie]:  # fmt: skip
    """The parameters of this rank's stages that other ranks' stages use too, in stage order.

    All ranks of all pipelines make all groups, in one order: torch names a group that only its
    members make by how many groups they have made before, and these numbers differ.
    """
    here = base.axis(mesh, "pp").rank
    holders: dict[int, set[int]] = {}
    for stage, owner in zip(stages, owners, strict=True):
        for tensor in stage.parameters():
            holders.setdefault(id(tensor), set()).add(owner)
    slots = {id(getattr(*slot)): slot for slot in held.values()}
    groups: dict[tuple[int, ...], Any] = {}
    ties = []
    for key, who in holders.items():
        members = tuple(sorted(who))
        if len(members) == 1:
            continue
        if members not in groups:
            every = [[line[rank] for rank in members] for line in base.lines(mesh, "pp")]
            groups[members], _ = dist.new_subgroups_by_enumeration(every, group_desc="tie")
        if here in who:
            ties.append(Tie(list(members), slots[key], groups[members]))
    return ties


def _refuse_shared_buffers(stages: list[nn.Module], owners: list[int]) -> None:
    """A buffer that stages on two ranks update (a shared BatchNorm) would diverge."""
    seen: dict[int, int] = {}
    for stage, owner in zip(stages, owners, strict=True):
        for module in stage.modules():
            if not isinstance(module, nn.modules.batchnorm._NormBase):
                continue
            for name, buffer in module.named_buffers(recurse=False):
                if seen.setdefault(id(buffer), owner) != owner:
                    raise base.StrategyError(
                        f"two stages on different ranks share a BatchNorm's {name}: cut elsewhere"
                    )
