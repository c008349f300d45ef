"""Closed forms of what each strategy sends, for the model at hand: predict's rules, fed with facts.

Nothing here runs a rank. A strategy without a form (or a model its form does not cover) gives None,
and the table says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

from pardemo.predict import SentBytes, memory, padded, sent_bytes
from pardemo.predict.sent import message
from pardemo.predict.strategy_memory import OPTIMIZER_STATES
from pardemo.strategies import fsdp, pipeline_plan, pipeline_split
from pardemo.strategies.base import factor, samples, to_device
from pardemo.workloads import Workload

MEMORY_FORMS = ("single", "ddp", "zero1", "fsdp", "context", "model_parallel", "pipeline")
LOSS_BYTES = 4.0  # the reported loss: one float32, all-reduced
CHAIN_LOSS_BYTES = 8.0  # from the last stage to all: one float64


@dataclass(frozen=True)
class Scene:
    """One workload on `ranks` ranks with a global batch; `backend` says what carries the data."""

    work: Workload
    ranks: int
    batch_size: int
    backend: str = "gloo"

    @cached_property
    def model(self) -> nn.Module:
        """The model, built once; only its shapes are read."""
        return self.work.make_model(0)

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, a tied one once."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def elements(self) -> int:
        """P: elements of all trainable parameters."""
        return sum(p.numel() for p in self.parameters)

    @property
    def element_bytes(self) -> int:
        """b: bytes of one element."""
        return self.parameters[0].element_size()

    @property
    def implementation(self) -> str:
        """How this backend carries out a reduce-scatter."""
        return "gloo" if self.backend == "gloo" else "textbook"

    @property
    def microbatches(self) -> int:
        """What the pipeline will choose for this batch."""
        plan = pipeline_plan.Plan.for_model(
            self.model, None, None, None, None, "parameters", "refuse"
        )
        return plan.count(self.batch_size, self.ranks)

    def batch(self, size: int) -> Any:
        """A batch of `size` samples on the CPU."""
        return to_device(self.work.make_batch(size, 0, 0), next(self.model.parameters()).device)

    @cached_property
    def stages(self) -> list[nn.Module]:
        """The model cut into one stage per rank, balanced by parameters."""
        return pipeline_split.chains(self.model, self.ranks, None, None)

    def boundaries(self, size: int) -> list[float]:
        """Bytes that cross each boundary between stages for `size` samples."""
        inputs = self.batch(size)[0]
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        edges = pipeline_split.Edges(self.stages).edges(given)[1:-1]
        return [float(sum(t.numel() * t.element_size() for t in edge)) for edge in edges]

    def shared(self) -> list[tuple[float, list[int]]]:
        """(bytes, stages) of every parameter that several stages use."""
        owners: dict[nn.Parameter, list[int]] = {}
        for number, stage in enumerate(self.stages):
            for p in dict.fromkeys(stage.parameters()):
                owners.setdefault(p, []).append(number)
        return [(p.numel() * p.element_size(), at) for p, at in owners.items() if len(at) > 1]

    def batchnorm(self) -> list[Any]:
        """Messages of synchronised BatchNorm layers: 2C+1 doubles forward, 2C values backward."""
        layers = [m for m in self.model.modules() if isinstance(m, _BatchNorm)]
        if not layers:
            return []
        wide = sum(8 * (2 * m.num_features + 1) for m in layers)
        back = sum(self.element_bytes * 2 * m.num_features for m in layers)
        text = "2(n-1)/n statistics of BatchNorm"
        calls = 2 * len(layers)
        return [message("all_reduce", "bn", self.ranks, wide + back, text, calls)]


Form = Callable[[Scene, int], SentBytes | None]


def closed_form(name: str, scene: Scene, rank: int) -> SentBytes | None:
    """What `rank` sends in one step by formula; None where there is no form."""
    if scene.ranks == 1 or name == "single":
        return sent_bytes("single")
    form = FORMS.get(name)
    return None if form is None else form(scene, rank)


def states_bytes(name: str, scene: Scene) -> float | None:
    """Parameters, gradients and optimiser state of the fullest rank, by formula."""
    optimizer = scene.work.make_optimizer(scene.parameters)
    kind = type(optimizer).__name__.lower()
    if kind == "sgd" and optimizer.defaults.get("momentum"):
        kind = "momentum"
    if kind not in OPTIMIZER_STATES or name not in MEMORY_FORMS:
        return None
    knobs: dict[str, Any] = {}
    if name in ("model_parallel", "pipeline"):
        held = [sum(p.numel() for p in dict.fromkeys(s.parameters())) for s in scene.stages]
        knobs["share"] = max(held) / scene.elements
    found = memory(
        name, parameters=scene.elements, ranks=scene.ranks, optimizer=kind,
        bytes_per_element=scene.element_bytes, **knobs,
    )  # fmt: skip
    return found.value


def _common(scene: Scene) -> dict[str, Any]:
    return {"ranks": scene.ranks, "bytes_per_element": scene.element_bytes}


def _ddp(scene: Scene, rank: int) -> SentBytes:
    sent = sent_bytes("ddp", parameters=scene.elements, loss_bytes=LOSS_BYTES, **_common(scene))
    return SentBytes("ddp", (*sent.messages, *scene.batchnorm()))


def _zero1(scene: Scene, rank: int) -> SentBytes:
    sent = sent_bytes(
        "zero1", parameters=scene.elements, style="all_reduce_broadcast", shard=scene.elements,
        shards=len(scene.parameters), loss_bytes=LOSS_BYTES, **_common(scene),
    )  # fmt: skip
    return SentBytes("zero1", (*sent.messages, *scene.batchnorm()))


def _sharded_knobs(scene: Scene, ranks: int) -> dict[str, Any]:
    """P, P_root and the number of units, padded as FSDP2 pads them for `ranks` shards."""
    units = fsdp.units(scene.model)
    inside = {p for _, unit in units for p in unit.parameters()}
    root = [p for p in scene.parameters if p not in inside]
    return {
        "parameters": padded((p.shape for p in scene.parameters), ranks),
        "root": padded((p.shape for p in root), ranks),
        "units": len(units) + bool(root),
        "bytes_per_element": scene.element_bytes,
        "implementation": scene.implementation,
        "loss_bytes": LOSS_BYTES,
    }


def _fsdp(scene: Scene, rank: int) -> SentBytes:
    sent = sent_bytes("fsdp", ranks=scene.ranks, **_sharded_knobs(scene, scene.ranks))
    return SentBytes("fsdp", (*sent.messages, *scene.batchnorm()))


def _hsdp(scene: Scene, rank: int) -> SentBytes:
    replicate, shard = factor(scene.ranks, 2)
    knobs = _sharded_knobs(scene, shard) | {"loss_bytes": 0.0}
    sent = sent_bytes("hsdp", shard=shard, replicate=replicate, ranks=scene.ranks, **knobs)
    loss = [
        message("all_reduce", axis, size, LOSS_BYTES, "2(n-1)/n * loss, axis by axis")
        for axis, size in (("shard", shard), ("replicate", replicate)) if size > 1
    ]  # fmt: skip
    return SentBytes("hsdp", (*sent.messages, *loss, *scene.batchnorm()))


def _model_parallel(scene: Scene, rank: int) -> SentBytes:
    sent = _chain(scene, rank, scene.boundaries(scene.batch_size), 1)
    extra = [
        message("send", "tied", 2, size * (len(at) - 1 if rank == at[0] else 1),
                "a shared parameter's gradient, there and back", len(at) - 1)
        for size, at in scene.shared() if rank in at
    ]  # fmt: skip
    loss = message("broadcast", "loss", scene.ranks, CHAIN_LOSS_BYTES, "the loss, to all")
    return SentBytes("model_parallel", (*sent.messages, *extra, loss))


def _pipeline(scene: Scene, rank: int) -> SentBytes:
    m = scene.microbatches
    sent = _chain(scene, rank, scene.boundaries(scene.batch_size // m), m)
    extra = [
        message("all_reduce", "tied", len(at), size, "2(k-1)/k of a parameter of k stages")
        for size, at in scene.shared() if rank in at
    ]  # fmt: skip
    loss = message("broadcast", "loss", scene.ranks, CHAIN_LOSS_BYTES, "the loss, to all")
    return SentBytes("pipeline", (*sent.messages, *extra, loss))


def _chain(scene: Scene, rank: int, sizes: list[float], microbatches: int) -> SentBytes:
    return sent_bytes(
        "pipeline", ranks=scene.ranks, activation_bytes=max(sizes), rank=rank,
        microbatches=microbatches, boundary_bytes=sizes,
    )  # fmt: skip


def _context(scene: Scene, rank: int) -> SentBytes:
    config: Any = scene.model.config
    tokens = samples(scene.batch(scene.batch_size)) * config.block_size
    return sent_bytes(
        "context", layers=config.n_layer, calls_per_hop=1, parameters=scene.elements,
        kv_bytes=2 * tokens * config.n_embd * scene.element_bytes, loss_bytes=LOSS_BYTES,
        **_common(scene),
    )  # fmt: skip


def _tensor(scene: Scene, rank: int) -> SentBytes | None:
    """Megatron's pairs in a transformer; other models split where their shapes allow: no form."""
    config: Any = getattr(scene.model, "config", None)
    if not hasattr(config, "n_layer"):
        return None
    tokens = scene.batch_size * config.block_size
    activation = tokens * config.n_embd * scene.element_bytes
    return sent_bytes(
        "tensor", ranks=scene.ranks, layers=config.n_layer, activation_bytes=activation
    )


FORMS: dict[str, Form] = {
    "ddp": _ddp,
    "zero1": _zero1,
    "fsdp": _fsdp,
    "hsdp": _hsdp,
    "model_parallel": _model_parallel,
    "pipeline": _pipeline,
    "context": _context,
    "tensor": _tensor,
}
