"""What a strategy adds to one process's parts: its own machinery, its messages, its waiting."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch.nn as nn

from pardemo.predict import Profile, SentBytes, Term
from pardemo.predict.prediction import human
from pardemo.predict.sent import message
from pardemo.predict.strategy_step import wrapper_terms
from pardemo.strategies import tensor_plans

from .forms import sharded_knobs
from .scene import Scene

CHAINS = ("model_parallel", "pipeline")


def each_message(name: str, scene: Scene, sent: SentBytes) -> SentBytes:
    """The same bytes as they are calibrated.

    ZeRO-1's broadcasts size by size: each tensor is a message, and norms' are mostly latency. A
    ring's sends as exchanges between two: every rank sends and receives at once.
    """
    if name == "zero1":
        sizes = Counter(p.numel() * scene.element_bytes for p in scene.model.parameters())
        text = "the tensors of one size, whole"
        each = [
            message("broadcast", "dp", scene.ranks, size * count, text, count, phase="optimizer")
            for size, count in sorted(sizes.items())
        ]
        rest = [m for m in sent.messages if m.kind != "broadcast"]
        return SentBytes(sent.strategy, (*rest, *each))
    if name == "context":
        pairs = [
            dataclasses.replace(m, kind="all_to_all", ranks=2, payload_bytes=2 * m.payload_bytes)
            if m.kind == "send"
            else m
            for m in sent.messages
        ]
        return SentBytes(sent.strategy, tuple(pairs))
    return sent


def waiting(name: str, sent: SentBytes, skew_s: float) -> list[Term]:
    """Ranks wait for the slowest wherever they meet; a part's own time holds one such wait.

    Cut into k pieces whose delays are independent, a step waits sqrt(k) times as long as it would
    once: each piece's delay is 1/sqrt(k) of the whole one's, and none makes up for another.
    """
    meetings = sum(m.calls for m in sent.messages if m.phase != "optimizer")
    if name in CHAINS or meetings < 2 or not skew_s:
        return []  # a chain's stages wait for each other in the simulated schedule
    text = f"(sqrt({meetings} meetings) - 1) x {human(skew_s, 's')} behind the mean rank"
    value = (meetings**0.5 - 1) * skew_s
    return [Term("waiting", text, value, "s", "given: ranks at the parts, measured")]


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
    config: Any = getattr(scene.model, "config", None)
    if name == "tensor" and hasattr(config, "n_layer"):
        linears = sum(isinstance(m, nn.Linear) for m in scene.model.modules()) - 1
        return wrapper_terms(profile, split_linears=linears)
    if name == "fsdp":
        known = sharded_knobs(scene, scene.ranks)
        # out of each gather, and into each reduce-scatter
        copied = (3 * known["parameters"] - known["root"]) * scene.element_bytes
        tensors = sum(bool(p.ndim) for p in scene.parameters)
        return wrapper_terms(
            profile, units=known["units"], unit_tensors=tensors, copied_bytes=copied
        )
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
