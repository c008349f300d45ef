"""Closed forms of strategies with a pipeline, or with more than one mesh axis."""

from __future__ import annotations

from pardemo.predict import padded, sent_bytes
from pardemo.predict.sent import Message, message
from pardemo.strategies import fsdp
from pardemo.strategies.base import take_shard

from . import scene as facts
from .forms import CHAIN_LOSS_BYTES, Routed, chain, flags, form, loss_sum, told_loss
from .scene import Scene


def _share(scene: Scene, replicas: int, place: int) -> int:
    """Samples of the global batch that replica `place` works on."""
    import torch

    part, _ = take_shard(torch.zeros(scene.batch_size), place, replicas)
    return len(part)


def _replicas_sum(size: float, ranks: int, text: str) -> list[Message]:
    """The gradients of what this rank holds, summed over its replicas."""
    return [message("all_reduce", "dp", ranks, size, f"2(d-1)/d {text}")] if ranks > 1 else []


@form("dp_tp")
def _dp_tp(scene: Scene, rank: int, routed: Routed | None) -> list[Message]:
    axes, place = scene.degrees("dp_tp"), scene.place("dp_tp", rank)
    d, t = axes["dp"], axes["tp"]
    kept = routed.kept if routed is not None else ()
    found = facts.pairs(scene.model, scene.inputs(_share(scene, d, place["dp"])), kept)
    held = facts.held_bytes(facts.slices(scene.model, t))
    return [
        *found.messages(t), *_replicas_sum(held, d, "(sliced P / t + whole P) b"),
        *flags(scene, scene.parameters, "dp", d), *facts.batchnorm(scene.model, {"dp": d}),
        loss_sum("dp", d),
    ]  # fmt: skip


@form("fsdp_tp")
def _fsdp_tp(scene: Scene, rank: int, routed: Routed | None) -> list[Message]:
    axes, place = scene.degrees("fsdp_tp"), scene.place("fsdp_tp", rank)
    d, t = axes["dp"], axes["tp"]
    kept = routed.kept if routed is not None else ()
    found = facts.pairs(scene.model, scene.inputs(_share(scene, d, place["dp"])), kept)
    shapes, units = facts.slices(scene.model, t), fsdp.units(scene.model)
    inside = {p for _, unit in units for p in unit.parameters()}
    sent = sent_bytes(
        "fsdp", ranks=d, parameters=padded(shapes.values(), d),
        root=padded((s for p, s in shapes.items() if p not in inside), d),
        frozen=padded((s for p, s in shapes.items() if not p.requires_grad), d),
        units=len(units) + any(p not in inside for p in shapes), regather_root=True,
        bytes_per_element=scene.element_bytes, implementation=scene.implementation,
    )  # fmt: skip
    return [
        *sent.messages, *found.messages(t), *facts.batchnorm(scene.model, {"dp": d}),
        loss_sum("dp", d),
    ]  # fmt: skip


def pipeline(name: str, scene: Scene, rank: int, microbatches: int = 0) -> list[Message]:
    """Boundaries, ties, slices, replicas and the loss of any strategy with a "pp" axis."""
    axes, place = scene.degrees(name), scene.place(name, rank)
    d, p, t = axes.get("dp", 1), axes["pp"], axes.get("tp", 1)
    size, at = scene.batch_size // d, place["pp"]
    m = microbatches or scene.microbatches(size, p)
    stages = scene.stages(p, size // m)
    mine, text = stages[at], "2(k-1)/k of a parameter of k stages"
    ties = [
        message("all_reduce", "tie", len(who), bytes_, text)
        for bytes_, who in facts.shared(stages) if at in who
    ]  # fmt: skip
    told = told_loss(scene, p, at, p - 1, "backward")
    found = chain(scene.boundaries(stages, size // m), at, m) + ties + [told]
    if t > 1:
        given = scene.entering(stages, at, size // m)
        found += facts.pairs(mine, given).messages(t, m)
    if d > 1:
        held = facts.held_bytes(facts.slices(mine, t))
        found += _replicas_sum(held, d, "P_stage b" if t == 1 else "P_stage of this slice b")
        found += flags(scene, mine.parameters(), "dp", d)
        found += [*facts.batchnorm(mine, {"dp": d}, m), *facts.choices(mine, "dp", d)]
        found.append(loss_sum("dp", d, CHAIN_LOSS_BYTES))
    return found


@form("pipeline")
def _plain(scene: Scene, rank: int, routed: Routed | None) -> list[Message]:
    return pipeline("pipeline", scene, rank)


@form("dp_pp")
def _dp_pp(scene: Scene, rank: int, routed: Routed | None) -> list[Message]:
    return pipeline("dp_pp", scene, rank)


@form("tp_pp")
def _tp_pp(scene: Scene, rank: int, routed: Routed | None) -> list[Message]:
    return pipeline("tp_pp", scene, rank)


@form("dp_pp_tp")
def _dp_pp_tp(scene: Scene, rank: int, routed: Routed | None) -> list[Message]:
    return pipeline("dp_pp_tp", scene, rank)
