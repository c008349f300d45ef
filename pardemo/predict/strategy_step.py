"""Predict a strategy's step from parts that were measured alone: compute, curves, optimiser.

T = compute of the slowest rank + bubble + exposed transfer + optimiser + launch. Nothing is
assumed hidden: `overlap.hidden_share` of the profile was measured on this machine, and is about 0
where ranks share cores; there `overlap.slowdown` says how much more a transfer costs than alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pardemo.predict.collectives import Curve
from pardemo.predict.model import Layers
from pardemo.predict.prediction import Prediction, Term, human
from pardemo.predict.profile import Profile, ProfileError
from pardemo.predict.schedules import schedule as simulate
from pardemo.predict.sent import SentBytes

OVERLAPS = ("ddp", "fsdp", "zero1", "zero2", "zero3", "hsdp")
CHAINS = ("pipeline", "model_parallel")


class Refused(ValueError):
    """A prediction the evidence cannot support; the message says what to measure."""


def compute_seconds(layers: Layers, batch: float, profile: Profile) -> tuple[float, float, str]:
    """(forward, backward, evidence) seconds of one process on `batch` samples.

    Every layer's FLOPs are looked up on the calibrated curve of its kind ("whole" where a kind was
    not calibrated). The curves' layers send a gradient to their input; one that works on data does
    not, and its backward takes its share of their FLOPs. ProfileError when nothing was.
    """
    kinds = layers.kinds or ("linear",) * len(layers.names)
    curves: dict[tuple[str, str], Curve] = {}
    for kind in set(kinds):
        rows = [r for r in profile.compute if r["kind"] == kind]
        rows = rows or [r for r in profile.compute if r["kind"] in ("whole", "linear")]
        if not rows:
            raise ProfileError(f"{profile.name}: no compute point for {kind!r}; run calibrate()")
        for way in ("forward_s", "backward_s"):
            sizes, times = [r["flops"] for r in rows], [max(r[way], 1e-12) for r in rows]
            curves[kind, way] = Curve("send", 1, 1, sizes, times)
    forward = backward = 0.0
    outside = False
    for kind, flops, back in zip(kinds, layers.flops, layers.backward, strict=True):
        if flops <= 0:
            continue
        f, seen = curves[kind, "forward_s"](flops * batch)
        b, _ = curves[kind, "backward_s"](flops * batch)
        outside |= "extrapolated" in seen
        forward, backward = forward + f, backward + b * back / (2 * flops)
    text = f"{profile.cite}, compute by layer kind"
    return forward, backward, f"extrapolated: {text}" if outside else text


def transfer_seconds(
    sent: SentBytes, ranks: int, nodes: int, profile: Profile, gap_s: float = math.inf
) -> list[Term]:
    """One term per message: calls x the curve at the size of one call.

    A message `beside` computation takes the curve that was timed so, where there is one; the others
    lie between those that come soon after another and those after a long computation, by the
    logarithm of `gap_s`, the seconds of computation between them.
    """
    curves, soon, hiding = (profile.curves(how) for how in ("", "soon", "beside"))
    nearness = _nearness(profile, gap_s)
    out = []
    for m in sent.messages:
        each = m.payload_bytes / m.calls
        group = 2 if m.kind in ("send", "recv") else m.ranks or ranks
        key = (m.kind, group, nodes)
        beside = m.beside and key in hiding.curves
        one, evidence = (hiding if beside else curves).time(m.kind, group, nodes, each)
        formula = f"{m.calls} x {m.kind} of {human(each, 'bytes')}"
        formula += " beside computation" if beside else ""
        near = 0.0 if beside or m.phase == "optimizer" else nearness
        if near and key in soon.curves and each <= soon.curves[key].range_bytes[1]:
            one = near * soon.time(m.kind, group, nodes, each)[0] + (1 - near) * one
            formula += f", {human(gap_s, 's')} apart"
        out.append(Term(f"{m.axis} {m.kind}", formula, m.calls * one, "s", evidence))
    return out


def _nearness(profile: Profile, gap_s: float) -> float:
    """1 for messages as close as the calibrated short gap or closer, 0 from the long one on."""
    short, long = profile.gap_s("soon"), profile.gap_s()
    if not 0 < short < long:
        return 0.0
    return 1 - float(np.clip(np.log(max(gap_s, short) / short) / np.log(long / short), 0, 1))


def wrapper_terms(
    profile: Profile,
    split_linears: int = 0,
    changing_linears: int = 0,
    units: int = 0,
    unit_tensors: int = 0,
    copied_bytes: float = 0,
) -> list[Term]:
    """Work that a strategy adds on each rank: dispatch and copies.

    `split_linears`: Linear layers whose weight is a DTensor; `changing_linears` of them get inputs
    of a new shape in every step. `units`: FSDP units, of `unit_tensors` parameter tensors together.
    `copied_bytes`: copied into and out of communication buffers. A part that the profile has not
    calibrated adds nothing.
    """
    out = []
    for name, count, key in (
        ("dtensor", split_linears, "dtensor_s"),
        ("new shapes", changing_linears, "dtensor_new_s"),
        ("units", units, "fsdp_s"),
        ("unit tensors", unit_tensors, "fsdp_tensor_s"),
    ):
        each = float(profile.launch.get(key, 0.0))
        if count and each:
            text = f"{count} x {human(each, 's')} to dispatch, forward and backward"
            out.append(Term(name, text, count * each, "s", profile.cite))
    if copied_bytes and profile.memory_bandwidth:
        text = f"{human(copied_bytes, 'bytes')} read and written again / memory bandwidth"
        seconds = 2 * copied_bytes / profile.memory_bandwidth
        out.append(Term("copies", text, seconds, "s", profile.cite))
    return out


def strategy_step(
    strategy: str,
    profile: Profile,
    ranks: int = 1,
    compute_s: float | None = None,
    layers: Layers | None = None,
    batch: int = 0,
    sent: SentBytes | None = None,
    parameters: float = 0,
    microbatches: int = 1,
    nodes: int = 1,
    shares: Sequence[float] | None = None,
    schedule: str = "gpipe",
    chunks: int = 1,
    forward_share: float = 1 / 3,
    oversubscribed: float = 1.0,
    extra: Sequence[Term] = (),
) -> Prediction:
    """Seconds of one step of `strategy` on `ranks` ranks.

    `compute_s`: one process's forward + backward on the GLOBAL batch (or `layers` and `batch`).
    `shares`: each stage's part of it. `parameters`: those one rank's optimiser updates.
    `oversubscribed`: ranks per core, above 1. `extra`: what the strategy adds to one process's
    work on each rank (see `wrapper_terms`). Refused without curves for what is sent.
    """
    evidence = "given: one process, measured"
    if compute_s is None:
        if layers is None or batch < 1:
            raise ValueError("give compute_s, or layers and batch")
        f, b, evidence = compute_seconds(layers, batch, profile)
        compute_s, forward_share = f + b, f / (f + b)
    parts = _compute_terms(
        strategy, compute_s, ranks, microbatches, shares, schedule, chunks, forward_share, evidence
    )
    parts[0] = _scaled(parts[0], oversubscribed)
    own = [_scaled(t, oversubscribed) for t in extra]
    if sent is not None and sent.total > 0:
        meetings = sum(m.calls for m in sent.messages if m.phase != "optimizer" and not m.beside)
        gap_s = sum(t.value for t in (parts[0], *own)) / max(1, meetings)
        parts += _exposed(strategy, sent, ranks, nodes, profile, gap_s)
    parts += own + _fixed_terms(profile, parameters, microbatches)
    lo, hi = _interval(parts, profile)
    return Prediction(f"step of {strategy} on {ranks} ranks", tuple(parts), "s", lo, hi)


def _exposed(
    strategy: str, sent: SentBytes, ranks: int, nodes: int, profile: Profile, gap_s: float
) -> list[Term]:
    """The transfers, less what computing hides of them; Refused without a curve for one."""
    try:
        moved = transfer_seconds(sent, ranks, nodes, profile, gap_s)
    except LookupError as error:
        raise Refused(str(error)) from None
    overlap = profile.overlap if strategy in OVERLAPS else {}
    hidden, slower = overlap.get("hidden_share", 0.0), overlap.get("slowdown", 1.0)
    factor, text = (1 - hidden) * slower, f"(1 - {hidden:g} hidden) x {slower:g} x "
    return [
        t if m.phase == "optimizer" or m.beside or factor == 1 else _scaled(t, factor, text)
        for m, t in zip(sent.messages, moved, strict=True)  # nothing computes beside the optimiser
    ]


def _fixed_terms(profile: Profile, parameters: float, microbatches: int) -> list[Term]:
    """The optimiser's time and what a step and a microbatch cost to launch."""
    parts = []
    if parameters and profile.optimizer:
        each = float(profile.optimizer["seconds_per_parameter"])
        fixed = float(profile.optimizer.get("fixed_s", 0.0))
        text = f"{parameters:.4g} parameters x {human(each, 's')} + {human(fixed, 's')}"
        parts.append(Term("optimizer", text, parameters * each + fixed, "s", profile.cite))
    launch = profile.launch.get("step_s", 0.0)
    launch += microbatches * profile.launch.get("microbatch_s", 0.0)
    if launch:
        parts.append(Term("launch", "per step + m x per microbatch", launch, "s", profile.cite))
    return parts


def _compute_terms(
    strategy: str,
    compute_s: float,
    ranks: int,
    m: int,
    shares: Sequence[float] | None,
    schedule: str,
    chunks: int,
    forward_share: float,
    evidence: str,
) -> list[Term]:
    """The slowest rank's own work, and for chains the waiting around it."""
    if strategy == "single" or ranks == 1:
        return [Term("compute", "one process", compute_s, "s", evidence)]
    if strategy not in CHAINS:
        return [Term("compute", f"one process / {ranks}", compute_s / ranks, "s", evidence)]
    stages = ranks * chunks
    part = np.asarray(shares if shares is not None else np.full(stages, 1 / stages), float)
    part = part / part.sum() * compute_s / m
    if strategy == "model_parallel":
        schedule, chunks = "gpipe", 1
    run = simulate(
        schedule, ranks, m, part * forward_share, part * (1 - forward_share), chunks=chunks
    )
    busy = max(run.busy)
    waits = run.time - busy
    wait_text = f"{schedule} simulated: {100 * waits / run.time:.0f} % of the slowest rank's step"
    return [
        Term("compute", f"slowest stage x {m} microbatches", busy, "s", evidence),
        Term("bubble", wait_text, waits, "s", evidence),
    ]


def _scaled(t: Term, factor: float, text: str = "") -> Term:
    return Term(t.name, text + t.formula, t.value * factor, t.unit, t.evidence)


def _interval(parts: Sequence[Term], profile: Profile) -> tuple[float, float]:
    """Spread of the calibration rounds, added in square to the profile's residual."""
    rows = [*profile.collectives, *profile.compute]
    spreads = []
    for row in rows:
        rounds = np.asarray(row.get("rounds_s", []), float)
        if rounds.ndim == 2:
            rounds = rounds.sum(axis=1)
        if len(rounds) >= 4 and np.median(rounds) > 0:
            draws = np.random.default_rng(0).choice(rounds, (200, len(rounds)))
            medians = np.median(draws, axis=1) / np.median(rounds)
            spreads.append(float(np.quantile(medians, 0.95) - np.quantile(medians, 0.05)) / 2)
    rounds_part = float(np.median(spreads)) if spreads else 0.1
    model_part = float((profile.residual or {"p90": 0.2})["p90"])
    spread = float(np.hypot(rounds_part, model_part))
    total = sum(t.value for t in parts)
    return total / (1 + spread), total * (1 + spread)
