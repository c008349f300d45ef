"""Closed forms of what each strategy sends, for the model at hand: predict's rules, fed with facts.

Nothing here runs a rank. A strategy without a form gives None, and the table says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn as nn

from pardemo.predict import SentBytes, padded, sent_bytes
from pardemo.predict.sent import Message, broadcast, message
from pardemo.strategies import fsdp, pipeline_split, routing, zero1
from pardemo.strategies.base import map_tensors, samples
from pardemo.strategies.replicas import model_bytes

from . import scene as facts
from .scene import Scene

LOSS_BYTES = 4.0  # the reported loss: one float32, all-reduced
CHAIN_LOSS_BYTES = 8.0  # from the last stage to all: one float64


@dataclass(frozen=True)
class Routed:
    """Rows that each mixture-of-experts layer of one rank sent away, took in, and kept."""

    away: tuple[int, ...] = ()
    guests: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()


Form = Callable[[Scene, int, Routed | None], Sequence[Message] | None]
FORMS: dict[str, Form] = {}


def form(name: str) -> Callable[[Form], Form]:
    """Register a closed form under its strategy's name."""

    def register(fn: Form) -> Form:
        FORMS[name] = fn
        return fn

    return register


def closed_form(
    name: str, scene: Scene, rank: int, routed: Routed | None = None
) -> SentBytes | None:
    """What `rank` sends in one step by formula; None where there is no form.

    `routed` says where a router really sent its rows; without it they are spread evenly.
    """
    if scene.ranks == 1 or name == "single":
        return sent_bytes("single")
    if name not in FORMS:
        return None
    found = FORMS[name](scene, rank, routed)
    if found is None:
        return None
    return SentBytes(name, tuple(m for m in found if m.calls and m.payload_bytes))


def loss_sum(axis: str, ranks: int, size: float = LOSS_BYTES) -> Message:
    """The reported loss, summed over one axis after the step."""
    return message("all_reduce", axis, ranks, size, "2(n-1)/n * loss", phase="forward")


def told_loss(scene: Scene, stages: int, at: int, last: int, phase: str) -> Message:
    """What the stage `at` sends when the last one broadcasts the loss to all."""
    size, text = {last: CHAIN_LOSS_BYTES}, "the loss, to all"
    return broadcast("pp", stages, size, at, text, 1, scene.implementation, phase)


def flags(scene: Scene, parameters: Iterable[nn.Parameter], axis: str, ranks: int) -> list[Message]:
    """After gradients are summed: had any rank one where the sum is zero (parts.add_gradients)?"""
    zero = len(scene.idle.intersection(parameters)) if ranks > 1 else 0
    text = "2(n-1)/n 4 B per gradient that is zero"
    return [message("all_reduce", axis, ranks, 4 * zero, text)] if zero else []


def _replicated(scene: Scene) -> list[Message]:
    """What every strategy that splits the batch over "dp" adds: BatchNorm, experts, the loss."""
    n = scene.ranks
    return [
        *facts.batchnorm(scene.model, {"dp": n}),
        *facts.choices(scene.model, "dp", n),
        loss_sum("dp", n),
    ]


@form("ddp")
def _ddp(scene: Scene, rank: int, routed: Routed | None) -> list[Message]:
    sent = sent_bytes(
        "ddp", ranks=scene.ranks, parameters=scene.elements, bytes_per_element=scene.element_bytes
    )
    return [*sent.messages, *_replicated(scene)]


@form("zero1")
def _zero1(scene: Scene, rank: int, routed: Routed | None) -> list[Message]:
    """DDP's all-reduce; then every tensor, frozen ones too, by the rank that owns it, to all."""
    sizes = [p.numel() for p in scene.model.parameters()]
    own = dict.fromkeys(range(scene.ranks), 0)
    for size, owner in zip(sizes, zero1.owners(sizes, scene.ranks), strict=True):
        own[owner] += size * scene.element_bytes
    text = "own tensors b" if scene.ranks == 2 else "tensors b, for every copy passed on"
    told = broadcast("dp", scene.ranks, own, rank, text, len(sizes), scene.implementation,
                     "optimizer")  # fmt: skip
    reduced = sent_bytes(
        "ddp", ranks=scene.ranks, parameters=scene.elements, bytes_per_element=scene.element_bytes
    )
    return [*reduced.messages, told, *_replicated(scene)]


@form("data_parallel")
def _data_parallel(scene: Scene, rank: int, routed: Routed | None) -> list[Message]:
    """All copies between the devices of one process; what stays on the root is not sent."""
    inputs, size = scene.batch(scene.batch_size)[0], scene.batch_size
    first = -(-size // scene.ranks)  # torch.chunk's size
    others, away = -(-size // first) - 1, size - first
    output = facts.output_of(scene, inputs)
    copies = [
        ("broadcast", others * model_bytes(scene.model), "(n-1) (P b + buffers)", "forward"),
        ("scatter", _bytes(inputs) * away / size, "the replicas' inputs", "forward"),
        ("gather", _bytes(output) * away / size, "the replicas' outputs", "forward"),
        ("scatter", _bytes(output, floating=True) * away / size, "their gradients", "backward"),
        ("reduce", others * scene.elements * scene.element_bytes, "(n-1) P b", "backward"),
    ]
    return [
        Message(kind, "devices", 1, sent, sent, text, phase, scene.ranks)
        for kind, sent, text, phase in copies
    ]


def _bytes(value: Any, floating: bool = False) -> int:
    """Bytes of all tensors of a nested value, or of those only that may have a gradient."""
    found: list[Any] = []
    map_tensors(lambda t: found.append(t) or t, value)  # type: ignore[func-returns-value]
    return sum(t.numel() * t.element_size() for t in found if t.is_floating_point() or not floating)


def sharded_knobs(scene: Scene, ranks: int) -> dict[str, Any]:
    """P, P_root and the number of units, padded as FSDP2 pads them for `ranks` shards."""
    units = fsdp.units(scene.model)
    inside = {p for _, unit in units for p in unit.parameters()}
    every = [p for p in scene.model.parameters() if p.ndim]  # FSDP leaves scalars alone
    root = [p for p in every if p not in inside]
    return {
        "parameters": padded((p.shape for p in every), ranks),
        "root": padded((p.shape for p in root), ranks),
        "frozen": padded((p.shape for p in every if not p.requires_grad), ranks),
        "units": len(units) + bool(root),
        "bytes_per_element": scene.element_bytes,
        "implementation": scene.implementation,
    }


def _scalars(scene: Scene, axes: dict[str, int]) -> list[Message]:
    """Gradients of parameters without a dim to split, one number each, axis by axis."""
    count = sum(p.ndim == 0 for p in scene.parameters)
    size, text = count * scene.element_bytes, "2(n-1)/n of each scalar parameter's gradient"
    return [message("all_reduce", axis, n, size, text, count) for axis, n in axes.items() if count]


@form("fsdp")
def _fsdp(scene: Scene, rank: int, routed: Routed | None) -> list[Message]:
    sent = sent_bytes("fsdp", ranks=scene.ranks, **sharded_knobs(scene, scene.ranks))
    return [*sent.messages, *_scalars(scene, {"dp": scene.ranks}), *_replicated(scene)]


@form("hsdp")
def _hsdp(scene: Scene, rank: int, routed: Routed | None) -> list[Message]:
    axes = {axis: n for axis, n in scene.degrees("hsdp").items() if n > 1}
    shard, replicate = axes.get("shard", 1), axes.get("replicate", 1)
    knobs = sharded_knobs(scene, shard)
    sent = sent_bytes("hsdp", shard=shard, replicate=replicate, ranks=scene.ranks, **knobs)
    return [
        *sent.messages, *_scalars(scene, axes), *facts.batchnorm(scene.model, axes),
        *facts.choices(scene.model, "world", scene.ranks),
        *(loss_sum(axis, n) for axis, n in axes.items()),
    ]  # fmt: skip


@form("model_parallel")
def _model_parallel(scene: Scene, rank: int, routed: Routed | None) -> list[Message]:
    if not pipeline_split.is_sequence(scene.model):
        return forms_mesh.pipeline("model_parallel", scene, rank, microbatches=1)
    parts = scene.parts(scene.ranks)
    sent = chain(scene.boundaries(parts, scene.batch_size), rank, 1)
    extra = [
        message("send", "pp", 2, size * (len(at) - 1 if rank == at[0] else 1),
                "a shared parameter's gradient, there and back",
                len(at) - 1 if rank == at[0] else 1)
        for size, at in facts.shared(parts) if rank in at
    ]  # fmt: skip
    return [*sent, *extra, told_loss(scene, scene.ranks, rank, scene.ranks - 1, "forward")]


def chain(sizes: Sequence[tuple[float, float]], rank: int, microbatches: int) -> list[Message]:
    """What stage `rank` sends over the boundaries beside it, of one microbatch there and back."""
    there, back = [size for size, _ in sizes], [size for _, size in sizes]
    sent = sent_bytes(
        "pipeline", ranks=len(sizes) + 1, activation_bytes=max(there), rank=rank,
        microbatches=microbatches, boundary_bytes=there, gradient_bytes=back,
    )  # fmt: skip
    return list(sent.messages)


@form("context")
def _context(scene: Scene, rank: int, routed: Routed | None) -> list[Message] | None:
    config: Any = getattr(scene.model, "config", None)
    if not hasattr(config, "n_layer"):
        return None
    inputs = scene.batch(scene.batch_size)[0]
    tokens = samples(inputs) * inputs.shape[1]
    sent = sent_bytes(
        "context", ranks=scene.ranks, layers=config.n_layer, parameters=scene.elements,
        kv_bytes=2 * tokens * config.n_embd * scene.element_bytes,
        bytes_per_element=scene.element_bytes,
    )  # fmt: skip
    full = [x for x in routing.seams(scene.model) if getattr(x, "capacity_factor", None)]
    pieces = message(
        "all_gather", "cp", scene.ranks,
        sum(8 * len(x.experts) * samples(inputs) * scene.ranks for x in full),
        "(n-1)/n choices per expert, sample and piece", len(full), phase="forward",
    )  # fmt: skip
    told = [*facts.choices(scene.model, "cp", scene.ranks), *([pieces] if full else [])]
    told += flags(scene, scene.parameters, "cp", scene.ranks)
    return [*sent.messages, *told, loss_sum("cp", scene.ranks)]


@form("tensor")
def _tensor(scene: Scene, rank: int, routed: Routed | None) -> list[Message]:
    """Every pair's row outputs forward, and the gradients of its columns' inputs backward."""
    found = facts.pairs(
        scene.model, scene.inputs(scene.batch_size), routed.kept if routed is not None else ()
    )
    return found.messages(scene.ranks)


@form("expert")
def _expert(scene: Scene, rank: int, routed: Routed | None) -> list[Message] | None:
    """Per layer the counts, the rows there and back, twice; then everything that is no expert."""
    layers, n, b = routing.seams(scene.model), scene.ranks, scene.element_bytes
    width: Any = getattr(getattr(scene.model, "config", None), "n_embd", None)
    if width is None:
        return None
    away = sum(routed.away) + sum(routed.guests) if routed else _evenly(scene, layers)
    experts = {p for layer in layers for p in layer.experts.parameters()}
    shared = [p for p in scene.parameters if p not in experts]
    rest = sum(p.numel() for p in shared)
    counts = sum(8 * (len(x.experts) - _share(len(x.experts), n, rank)) for x in layers)
    rows, text = away * width * b, "(rows sent away + guests' rows) D b"
    return [
        *facts.choices(scene.model, "ep", n),
        Message("all_to_all", "ep", 3 * len(layers), counts + rows, counts + rows,
                f"counts + {text}", "forward", n),
        Message("all_to_all", "ep", 2 * len(layers), rows, rows, text, "backward", n),
        message("all_reduce", "ep", n, rest * b, "2(e-1)/e P_shared b"),
        *flags(scene, shared, "ep", n),
        loss_sum("ep", n),
    ]  # fmt: skip


def _share(experts: int, ranks: int, rank: int) -> int:
    return experts // ranks + (rank < experts % ranks)


def _evenly(scene: Scene, layers: Sequence[Any]) -> float:
    """Rows sent away and taken in when the router spreads its choices evenly."""
    inputs, n = scene.batch(scene.batch_size)[0], scene.ranks
    tokens = samples(inputs) * inputs.shape[1] / n
    return 2 * sum(tokens * layer.top_k * (n - 1) / n for layer in layers)


from . import forms_mesh  # noqa: E402  it registers the forms of meshes here
