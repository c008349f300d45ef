"""Predict every strategy's step before it is measured, from parts that were measured alone.

The parts: forward and backward of one process on the share of the batch that a rank will have (on
all ranks at once, so that they share the machine as they will, but exchange nothing), one optimiser
step, and the calibrated curves of the collectives. What is added is predict's arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh

from pardemo import predict
from pardemo.launch import Ranks
from pardemo.measure import Case, calibrate, compare
from pardemo.predict import Prediction, Profile, ProfileError, Term, load
from pardemo.predict.strategy_step import wrapper_terms
from pardemo.strategies.base import call, to_device
from pardemo.workloads import Workload

from .forms import Scene, closed_form, sharded_knobs

CHAINS = ("model_parallel", "pipeline")
MESHES = ("dp_tp", "fsdp_tp", "dp_pp", "tp_pp", "dp_pp_tp")
SHARDED = ("fsdp", "hsdp", "zero1", "tensor", "expert", *CHAINS)  # optimiser state in parts
WHOLE_BATCH = ("tensor", "context", "expert")  # every rank sees all samples, a part of each


@dataclass(frozen=True)
class Part:
    """One part alone, inside a rank: forward and backward of `size` samples, or the optimiser."""

    work: Workload
    size: int

    def __call__(self, mesh: DeviceMesh | None) -> Callable[[], Any]:
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


@dataclass(frozen=True)
class Parts:
    """Seconds of each part: forward and backward by samples, and the optimiser (whole model)."""

    by_size: dict[int, float]
    optimizer_s: float

    def __repr__(self) -> str:
        told = ", ".join(f"{size} samples {s * 1e3:.3g} ms" for size, s in self.by_size.items())
        return (
            f"one process, forward and backward: {told}; optimizer {self.optimizer_s * 1e3:.3g} ms"
        )


def measure_parts(scene: Scene, names: Sequence[str], ranks: Ranks, budget_s: float) -> Parts:
    """Time the parts that the predictions of `names` need, interleaved, without any transfer."""
    sizes = sorted({size for name in names for size in sizes_needed(scene, name)})
    cases = {f"{size} samples": Case(Part(scene.work, size), ranks=scene.ranks) for size in sizes}
    cases["optimizer"] = Case(Part(scene.work, 0), ranks=scene.ranks)
    found = compare(cases, ranks=ranks, rounds=6, max_rounds=12, budget_s=budget_s)
    return Parts(
        {size: found[f"{size} samples"].median_s for size in sizes}, found["optimizer"].median_s
    )


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


def additions(name: str, scene: Scene, profile: Profile) -> list[Term]:
    """What the strategy's own machinery costs on each rank, from calibrated constants."""
    config: Any = getattr(scene.model, "config", None)
    if name == "tensor" and hasattr(config, "n_layer"):
        linears = sum(isinstance(m, nn.Linear) for m in scene.model.modules()) - 1
        return wrapper_terms(profile, split_linears=linears)
    if name == "fsdp":
        known = sharded_knobs(scene, scene.ranks)
        # out of each gather, and into each reduce-scatter
        copied = (3 * known["parameters"] - known["root"]) * scene.element_bytes
        return wrapper_terms(profile, units=known["units"], copied_bytes=copied)
    if name == "context" and hasattr(config, "n_layer"):
        length = config.block_size
        flops = 4.0 * scene.batch_size * config.n_embd * length * length / scene.ranks
        terms = wrapper_terms(profile, ring_flops=flops, ring_blocks=scene.ranks)
        layers = config.n_layer
        return [
            dataclasses.replace(t, value=t.value * layers, formula=f"{layers} layers x {t.formula}")
            for t in terms
        ]
    return []


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
        launch={},  # the parts contain what launching costs; wrappers are terms of their own
    )  # fmt: skip
    knobs: dict[str, Any] = {"microbatches": times} if name in CHAINS else {}
    if name in CHAINS:
        counts = [
            sum(p.numel() for p in stage.parameters()) for stage in scene.stages(scene.ranks, size)
        ]
        knobs["shares"] = [count / sum(counts) for count in counts]
        knobs["schedule"] = "1f1b"
    try:
        found = predict.step(
            name, profile=known, ranks=scene.ranks, compute_s=alone * times * spread, sent=sent,
            parameters=held, oversubscribed=max(1.0, scene.ranks / cores),
            extra=additions(name, scene, profile), **knobs,
        )  # fmt: skip
    except (predict.Refused, ProfileError) as error:
        return f"{name}: no prediction: {error}"
    return found
