"""What a strategy adds to one process's parts: its own machinery, and its messages."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import nn

from pardemo.measure.causes_sent import DEFAULT_CAP, FIRST_CAP
from pardemo.predict import Profile, SentBytes, Term
from pardemo.predict.prediction import human
from pardemo.predict.sent import Message
from pardemo.predict.strategy_step import wrapper_terms
from pardemo.strategies import tensor_plans
from pardemo.strategies.base import call

from .forms import sharded_knobs
from .scene import Scene

CHAINS = ("model_parallel", "pipeline")


def each_message(name: str, scene: Scene, sent: SentBytes) -> SentBytes:
    """The same bytes as they are calibrated.

    ZeRO-1's broadcasts size by size: each tensor is a message, and norms' are mostly latency. DDP's
    gradients by buckets, of which only the last has no computation beside it. A ring's sends as
    exchanges between two beside computation: every rank sends and receives at once.
    """
    found = list(sent.messages)
    if name == "zero1":
        sizes = Counter(p.numel() * scene.element_bytes for p in scene.model.parameters())
        text = "the tensors of one size, whole"
        (whole,) = (m for m in found if m.kind == "broadcast")
        each = [
            dataclasses.replace(
                whole, calls=count, payload_bytes=float(size * count), formula=text,
                sent_bytes=whole.sent_bytes * size * count / whole.payload_bytes,
            )
            for size, count in sorted(sizes.items())
        ]  # fmt: skip
        found = [*(m for m in found if m.kind != "broadcast"), *each]
    if name in ("ddp", "zero1"):
        return SentBytes(sent.strategy, tuple(part for m in found for part in _buckets(m, scene)))
    if name == "context":
        pairs = [
            dataclasses.replace(
                m, kind="all_to_all", ranks=2, payload_bytes=2 * m.payload_bytes, beside=True
            )
            if m.kind == "send"
            else m
            for m in found
        ]
        return SentBytes(sent.strategy, tuple(pairs))
    return sent


def _buckets(m: Message, scene: Scene) -> list[Message]:
    """DDP's gradients as they are sent: all buckets but the last beside the backward pass."""
    sizes = [p.numel() * p.element_size() for p in reversed(scene.parameters)]
    if m.kind != "all_reduce" or m.phase != "backward" or m.payload_bytes != sum(sizes):
        return [m]
    filled = [0]
    for size in sizes:
        if filled[-1] >= (DEFAULT_CAP if len(filled) > 1 else FIRST_CAP):
            filled.append(0)
        filled[-1] += size
    return [
        dataclasses.replace(
            m, calls=1, payload_bytes=float(bucket), beside=i < len(filled) - 1,
            sent_bytes=m.sent_bytes * bucket / sum(sizes),
        )
        for i, bucket in enumerate(filled)
    ]  # fmt: skip


def changing_linears(scene: Scene) -> set[str]:
    """Linear layers whose input has another shape in the next batch: those of experts."""
    model, shapes = copy.deepcopy(scene.model), defaultdict[str, set[torch.Size]](set)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            note = functools.partial(_note_shape, shapes[name])
            module.register_forward_pre_hook(note)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for step in range(2):
            call(model, scene.work.make_batch(scene.batch_size, step, 0)[0])
    return {name for name, seen in shapes.items() if len(seen) > 1}


def _note_shape(seen: set[torch.Size], _: nn.Module, given: tuple[Any, ...]) -> None:
    seen.update(x.shape for x in given if isinstance(x, torch.Tensor))


def slices(name: str, scene: Scene, slice_s: float) -> list[Term]:
    """What the optimiser's step takes longer because parameters are slices of tensors."""
    count = 0
    if name in ("fsdp", "hsdp"):
        count = sum(bool(p.ndim) for p in scene.parameters)
    elif name == "tensor":
        body = scene.model
        for pair in tensor_plans.pairs(body):
            for path in (*pair.columns, pair.rows):
                count += len(list(body.get_submodule(path).parameters()))
    if not count or not slice_s:
        return []
    text = f"{count} tensors x {human(slice_s, 's')} to dispatch the optimiser's operators"
    return [Term("slices", text, count * slice_s, "s", "given: the optimiser, measured")]


def additions(name: str, scene: Scene, profile: Profile) -> list[Term]:
    """What the strategy's own machinery costs on each rank, from calibrated constants."""
    if name == "tensor":
        found = tensor_plans.pairs(scene.model)
        linears = [name for pair in found for name in (*pair.columns, pair.rows)]
        changing = len(changing_linears(scene).intersection(linears))
        return wrapper_terms(profile, split_linears=len(linears), changing_linears=changing)
    if name == "fsdp":
        known = sharded_knobs(scene, scene.ranks)
        # out of each gather, and into each reduce-scatter
        copied = (3 * known["parameters"] - known["root"]) * scene.element_bytes
        tensors = sum(bool(p.ndim) for p in scene.parameters)
        return wrapper_terms(
            profile, units=known["units"], unit_tensors=tensors, copied_bytes=copied
        )
    return []
