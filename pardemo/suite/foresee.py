"""Predict every strategy's step before it is measured, from parts that were measured alone.

The parts: forward and backward of one process on the share of the batch that a rank will have (on
all ranks at once, so that they share the machine as they will, but exchange nothing), one optimiser
step, on plain tensors and on slices of them (DTensors, whose every operator is dispatched in
Python), and the calibrated curves of the collectives. What is added is predict's arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from pardemo import predict
from pardemo.launch import Ranks
from pardemo.measure import Case, Comparison, calibrate, compare
from pardemo.predict import Prediction, Profile, ProfileError, load
from pardemo.strategies.base import call, to_device
from pardemo.workloads import Workload

from .foresee_terms import CHAINS, additions, each_message, slices, waiting
from .forms import Scene, closed_form

MESHES = ("dp_tp", "fsdp_tp", "dp_pp", "tp_pp", "dp_pp_tp")
SHARDED = ("fsdp", "hsdp", "zero1", "tensor", "expert", *CHAINS)  # optimiser state in parts
SLICED = {"fsdp", "hsdp", "tensor"}  # parameters are DTensors
WHOLE_BATCH = ("tensor", "context", "expert")  # every rank sees all samples, a part of each


@dataclass(frozen=True)
class Part:
    """One part alone, inside a rank: forward and backward of `size` samples, or the optimiser."""

    work: Workload
    size: int
    sliced: bool = False  # the optimiser, on each rank's slices of the parameters

    def __call__(self, mesh: DeviceMesh | None) -> Callable[[], Any]:
        if self.sliced:
            assert mesh is not None
            return self._on_slices(mesh)
        model = self.work.make_model(0)
        device = next(model.parameters()).device
        inputs, targets = to_device(self.work.make_batch(max(self.size, 1), 0, 0), device)
        optimizer = self.work.make_optimizer(model.parameters())

        def forward_backward() -> None:
            model.zero_grad()
            self.work.loss(call(model, inputs), targets).backward()

        if self.size:
            return forward_backward
        forward_backward()
        return optimizer.step

    def _on_slices(self, mesh: DeviceMesh) -> Callable[[], Any]:
        """The optimiser over the model's parameters cut along dim 0; nothing is sent."""
        model = self.work.make_model(0)
        kept = [p for p in model.parameters() if p.requires_grad and p.ndim]
        slices = [
            nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)], src_data_rank=None))
            for p in kept
        ]
        for own in slices:
            own.grad = torch.ones_like(own) * 1e-3
        return self.work.make_optimizer(slices).step


@dataclass(frozen=True)
class Parts:
    """Seconds of each part: forward and backward by samples, and the optimiser (whole model).

    `slice_s`: what one parameter tensor that is a slice (a DTensor) adds to the optimiser's step.
    `skew_s`: how much later than the mean rank the slowest one ends forward and backward.
    """

    by_size: dict[int, float]
    optimizer_s: float
    slice_s: float = 0.0
    skew_s: float = 0.0

    def __repr__(self) -> str:
        told = ", ".join(f"{size} samples {s * 1e3:.3g} ms" for size, s in self.by_size.items())
        text = f"one process, forward and backward: {told}; optimizer {self.optimizer_s * 1e3:.3g}"
        more = f", {self.slice_s * 1e3:.3g} ms more per sliced tensor" if self.slice_s else ""
        return f"{text} ms{more}"


def part_cases(scene: Scene, names: Sequence[str]) -> dict[str, Case]:
    """The parts that the predictions of `names` need; none of them sends anything."""
    sizes = sorted({size for name in names for size in sizes_needed(scene, name)})
    parts = {f"part: {size} samples": Part(scene.work, size) for size in sizes}
    parts["part: optimizer"] = Part(scene.work, 0)
    if SLICED.intersection(names):
        parts["part: on slices"] = Part(scene.work, 0, sliced=True)
    return {name: Case(part, ranks=scene.ranks) for name, part in parts.items()}


def read_parts(scene: Scene, names: Sequence[str], found: Comparison) -> Parts:
    """The parts' seconds from a comparison that held `part_cases`."""
    sizes = sorted({size for name in names for size in sizes_needed(scene, name)})
    whole, each = found["part: optimizer"].median_s, 0.0
    if SLICED.intersection(names):
        tensors = sum(bool(p.ndim) for p in scene.parameters)
        each = max(0.0, found["part: on slices"].median_s - whole / scene.ranks) / max(1, tensors)
    by_size = {size: found[f"part: {size} samples"].median_s for size in sizes}
    blocks = found.samples.of(f"part: {sizes[0]} samples")
    late = [float(np.median(b.wall_s.max(axis=0) - b.wall_s.mean(axis=0))) for b in blocks]
    skew = float(np.median(late)) * (by_size[max(sizes)] / by_size[sizes[0]]) ** 0.5
    return Parts(by_size, whole, each, skew)


def measure_parts(scene: Scene, names: Sequence[str], ranks: Ranks, budget_s: float) -> Parts:
    """Time the parts that the predictions of `names` need, interleaved, without any transfer."""
    how: dict[str, Any] = {"rounds": 6, "max_rounds": 12, "budget_s": budget_s}
    return read_parts(scene, names, compare(part_cases(scene, names), ranks=ranks, **how))


def known_machine(profile: Profile | str | None, ranks: Ranks) -> Profile:
    """The given machine profile, or a new one: collectives of this many ranks, and of pairs."""
    if isinstance(profile, Profile):
        return profile
    if profile is not None:
        return load(profile)
    sizes = sorted({2, ranks.setup.nprocs})
    return load(calibrate(ranks=ranks, world_sizes=sizes, budget_s=10.0))


def share(scene: Scene, name: str) -> int:
    """How many samples one rank works on at a time under this strategy."""
    if name == "pipeline":
        return scene.batch_size // scene.microbatches(scene.batch_size, scene.ranks)
    if name in WHOLE_BATCH or name == "model_parallel":
        return scene.batch_size
    return -(-scene.batch_size // scene.ranks)


def sizes_needed(scene: Scene, name: str) -> set[int]:
    """The sizes at which one process is timed for this prediction."""
    part = -(-scene.batch_size // scene.ranks)
    if name == "context":
        return {part}
    return {share(scene, name), part} if name == "tensor" else {share(scene, name)}


def alone_s(name: str, scene: Scene, parts: Parts) -> float:
    """Seconds that one rank computes at a time, nothing exchanged.

    Context parallel: as many tokens as in its share of the samples. Tensor parallel: the operators
    of the whole batch, but only the share of the work that is cut becomes 1/n; the straight line
    through two sizes holds both, what an operator costs to launch and what it costs to run.
    """
    part = -(-scene.batch_size // scene.ranks)
    if name == "context":
        return parts.by_size[part]
    whole = parts.by_size[share(scene, name)]
    if name != "tensor":
        return whole
    cut = cut_share(scene)
    return parts.by_size[part] * cut + whole * (1 - cut)


def cut_share(scene: Scene) -> float:
    """Share of a transformer's FLOPs that tensor parallelism cuts: all but the head's."""
    config: Any = getattr(scene.model, "config", None)
    if not hasattr(config, "n_layer"):
        return 1.0
    head = config.vocab_size * config.n_embd
    weights = sum(m.weight.numel() for m in scene.model.modules() if isinstance(m, nn.Linear))
    scores = 2 * config.n_layer * config.block_size * config.n_embd
    return 1 - head / max(weights + scores, head)


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
    alone = alone_s(name, scene, parts)
    by_rank = name in ("tensor", "context")  # seconds of one rank already
    spread = scene.ranks if by_rank or name not in (*WHOLE_BATCH, *CHAINS) else 1
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
        knobs["schedule"] = "1f1b"
    extra = additions(name, scene, profile) + slices(name, scene, parts.slice_s)
    extra += waiting(name, sent, parts.skew_s)
    try:
        found = predict.step(
            name, profile=known, ranks=scene.ranks, compute_s=alone * times * spread,
            sent=each_message(name, scene, sent),
            parameters=held, oversubscribed=max(1.0, scene.ranks / cores),
            extra=extra, **knobs,
        )  # fmt: skip
    except (predict.Refused, ProfileError) as error:
        return f"{name}: no prediction: {error}"
    return found
