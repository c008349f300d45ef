"""Predict every strategy's step before it is measured, from parts that were measured alone.

The parts: forward and backward of what one rank will compute (its share of the batch, its slice of
the layers, its positions), in one process that exchanges nothing, on all ranks at once, so that
they share the machine as they will; the same with the optimiser behind it, on plain tensors and on
slices of them (DTensors, whose every operator is dispatched in Python); and the calibrated curves
of the collectives. What is added is predict's arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from pardemo import predict
from pardemo.launch import Ranks
from pardemo.measure import Case, Comparison, calibrate, compare
from pardemo.measure.collectives import KINDS
from pardemo.predict import Prediction, Profile, ProfileError, load
from pardemo.strategies import batchnorm
from pardemo.strategies.base import call, to_device
from pardemo.strategies.ring_attention import positions_of
from pardemo.workloads import Workload

from . import alone
from .foresee_terms import CHAINS, additions, each_message, slices
from .forms import Scene, closed_form

MESHES = ("dp_tp", "fsdp_tp", "dp_pp", "tp_pp", "dp_pp_tp")
SHARDED = ("fsdp", "hsdp", "zero1", "tensor", "expert", *CHAINS)  # optimiser state in parts
SLICED = {"fsdp", "hsdp", "tensor"}  # parameters are DTensors
REPLICAS, COUNTED = ("ddp", "zero1", "fsdp", "hsdp"), "statistics"
CUTS = ("tensor", "context", "expert")  # a rank has a part of the layers, or of each sample


@dataclass(frozen=True)
class Part:
    """One part alone, inside a rank: forward and backward of `size` samples.

    `cut`: "tensor", "context" or "expert", for a rank's slice of the layers, positions of the
    samples, or experts; "statistics" for the BatchNorm that adds them up over ranks.
    `optimizer`: with its step behind, over the "whole" model or over "slices" of every tensor.
    """

    work: Workload
    size: int
    cut: str = ""
    optimizer: str = ""

    def __call__(self, mesh: DeviceMesh | None) -> Callable[[], Any]:
        model = self.work.make_model(0)
        device = next(model.parameters()).device
        inputs, targets = to_device(self.work.make_batch(max(self.size, 1), 0, 0), device)
        if self.cut and mesh is not None:
            inputs, targets = self._cut(model, inputs, targets, mesh)
        update = self._update(model, mesh)

        def step() -> None:
            model.zero_grad()
            self.work.loss(call(model, inputs), targets).backward()
            update()

        return step

    def _cut(self, model: nn.Module, inputs: Any, targets: Any, mesh: DeviceMesh) -> Any:
        """Leave of the model and of its batch what this rank will have; nothing is sent."""
        rank, ranks = mesh.get_rank(), mesh.size()
        if self.cut == "tensor":
            alone.cut_layers(model, ranks)
        if self.cut == "statistics":
            alone.count_alone(model)
        if self.cut == "expert":
            alone.keep_experts(model, rank, ranks)
        if self.cut != "context":
            return inputs, targets
        where = positions_of(rank, ranks, inputs.shape[1], "contiguous")
        alone.cut_positions(model, where, rank, ranks, "ring", "contiguous")
        return inputs[:, where], targets[:, where]

    def _update(self, model: nn.Module, mesh: DeviceMesh | None) -> Callable[[], Any]:
        """The optimiser's step; over the parameters cut along dim 0 where slices are asked for."""
        if not self.optimizer:
            return lambda: None
        if self.optimizer == "whole":
            return self.work.make_optimizer(model.parameters()).step
        kept = [p for p in model.parameters() if p.requires_grad and p.ndim]
        slices = [
            nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)], src_data_rank=None))
            for p in kept
        ]
        for own in slices:
            own.grad = torch.ones_like(own) * 1e-3
        return self.work.make_optimizer(slices).step


Key = int | str  # samples, or the strategy whose cut of them it is


@dataclass(frozen=True)
class Parts:
    """Seconds of each part: forward and backward by samples or by cut, and the optimiser's step.

    `optimizer_s`: the whole model's, behind a backward pass. `slice_s`: what one parameter tensor
    that is a slice (a DTensor) adds to it.
    """

    by_size: dict[Key, float]
    optimizer_s: float
    slice_s: float = 0.0

    def __repr__(self) -> str:
        told = ", ".join(f"{_told(key)} {s * 1e3:.3g} ms" for key, s in self.by_size.items())
        text = f"one process, forward and backward: {told}; optimizer {self.optimizer_s * 1e3:.3g}"
        more = f", {self.slice_s * 1e3:.3g} ms more per sliced tensor" if self.slice_s else ""
        return f"{text} ms{more}"


def _told(key: Key) -> str:
    return f"{key} samples" if isinstance(key, int) else f"a rank's part under {key}"


def _keys(scene: Scene, names: Sequence[str]) -> list[Key]:
    """The parts of `names`, sizes first."""
    return sorted(
        {needed(scene, name) for name in names}, key=lambda key: (str(key).isalpha(), key)
    )


def _updated(scene: Scene) -> int:
    """Samples of the part behind which the optimiser is timed: a rank's share."""
    return -(-scene.batch_size // scene.ranks)


def part_cases(scene: Scene, names: Sequence[str]) -> dict[str, Case]:
    """The parts that the predictions of `names` need; none of them sends anything."""
    work, size = scene.work, _updated(scene)
    parts = {
        f"part: {_told(key)}": Part(work, key)
        if isinstance(key, int)
        else Part(work, size if key in (COUNTED, "expert") else scene.batch_size, cut=key)
        for key in {**dict.fromkeys(_keys(scene, names)), size: None}
    }
    parts["part: with the optimizer"] = Part(work, size, optimizer="whole")
    if SLICED.intersection(names):
        parts["part: on slices"] = Part(work, size, optimizer="slices")
    return {name: Case(part, ranks=scene.ranks) for name, part in parts.items()}


def read_parts(scene: Scene, names: Sequence[str], found: Comparison) -> Parts:
    """The parts' seconds from a comparison that held `part_cases`."""
    alone_s = found[f"part: {_told(_updated(scene))}"].median_s
    whole, each = max(0.0, found["part: with the optimizer"].median_s - alone_s), 0.0
    if SLICED.intersection(names):
        tensors = sum(bool(p.ndim) for p in scene.parameters)
        sliced = found["part: on slices"].median_s - alone_s
        each = max(0.0, sliced - whole / scene.ranks) / max(1, tensors)
    by_size = {key: found[f"part: {_told(key)}"].median_s for key in _keys(scene, names)}
    return Parts(by_size, whole, each)


def measure_parts(scene: Scene, names: Sequence[str], ranks: Ranks, budget_s: float) -> Parts:
    """Time the parts that the predictions of `names` need, interleaved, without any transfer."""
    how: dict[str, Any] = {"rounds": 6, "max_rounds": 12, "budget_s": budget_s}
    return read_parts(scene, names, compare(part_cases(scene, names), ranks=ranks, **how))


def known_machine(
    profile: Profile | str | None, ranks: Ranks, kinds: Iterable[str] = KINDS
) -> Profile:
    """The given profile, or a new one: these collectives of this many ranks, and of pairs."""
    if isinstance(profile, Profile):
        return profile
    if profile is not None:
        return load(profile)
    sizes = sorted({2, ranks.setup.nprocs})
    return load(calibrate(ranks=ranks, world_sizes=sizes, kinds=sorted(kinds), budget_s=20.0))


def share(scene: Scene, name: str) -> int:
    """How many samples one rank works on at a time under this strategy."""
    if name == "pipeline":
        return scene.batch_size // scene.microbatches(scene.batch_size, scene.ranks)
    if name == "model_parallel":
        return scene.batch_size
    return -(-scene.batch_size // scene.ranks)


def needed(scene: Scene, name: str) -> Key:
    """The part that is timed for this prediction: so many samples, or this strategy's cut."""
    if name in REPLICAS and scene.backend == "gloo" and batchnorm.has_batchnorm(scene.model):
        return COUNTED
    return name if name in CUTS else share(scene, name)


def kinds_sent(scene: Scene, names: Iterable[str]) -> set[str]:
    """The collectives whose curves the predictions of `names` need."""
    found = set()
    for name in names:
        sent = None if name in MESHES else closed_form(name, scene, scene.ranks - 1)
        if sent is not None:
            found |= {m.kind for m in each_message(name, scene, sent).messages}
    return found & set(KINDS)


def overlap(profile: Profile, scene: Scene, cores: int) -> dict[str, float]:
    """What was measured of it, but nothing hides on a CPU all of whose cores compute."""
    if scene.backend == "gloo" and scene.ranks >= cores:
        return profile.overlap | {"hidden_share": 0.0}
    return profile.overlap


def predicted(
    name: str, scene: Scene, parts: Parts, profile: Profile, cores: int
) -> Prediction | str:
    """The step's time, or in words why there is no prediction."""
    if name in MESHES:
        return f"{name}: step times are predicted on one axis at a time, its bytes on all of them"
    sent = closed_form(name, scene, scene.ranks - 1)
    if sent is None:
        return f"{name}: no closed form of its transfer for this model, so no prediction"
    size = share(scene, name)
    times = scene.batch_size // size if name == "pipeline" else 1
    part_s = parts.by_size[needed(scene, name)]
    spread = 1 if name in CHAINS else scene.ranks  # the part is one rank's
    held = scene.elements / (scene.ranks if name in SHARDED else 1)
    known = dataclasses.replace(
        profile,
        optimizer={"name": "measured", "seconds_per_parameter": parts.optimizer_s / scene.elements,
                   "fixed_s": 0.0},
        overlap=overlap(profile, scene, cores),
        launch={},  # the parts contain what launching costs; wrappers are terms of their own
    )  # fmt: skip
    knobs: dict[str, Any] = {"microbatches": times} if name in CHAINS else {}
    if name in CHAINS:
        counts = [
            sum(p.numel() for p in stage.parameters()) for stage in scene.stages(scene.ranks, size)
        ]
        knobs["shares"] = [count / sum(counts) for count in counts]
        knobs["schedule"] = "1f1b" if times >= scene.ranks else "gpipe"
    extra = additions(name, scene, profile) + slices(name, scene, parts.slice_s)
    try:
        found = predict.step(
            name, profile=known, ranks=scene.ranks, compute_s=part_s * times * spread,
            sent=each_message(name, scene, sent),
            parameters=held, oversubscribed=max(1.0, scene.ranks / cores),
            extra=extra, **knobs,
        )  # fmt: skip
    except (predict.Refused, ProfileError) as error:
        return f"{name}: no prediction: {error}"
    return found
