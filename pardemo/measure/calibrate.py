"""calibrate(): this machine's profile in about half a minute, as a dated, JSON-able dict.

What is measured, interleaved in rounds: each collective by size and world size, among pieces of
computation as in a step (one of several in a row, or one after a pause, meets another state of the
machine); compute by layer kind and shape, forward and backward; the optimizer per parameter; what a
step costs to launch; how much of its communication a DDP step hides. Times in seconds, sizes in
bytes. The schema is "pardemo-profile/1"; nothing in it is fitted, so a prediction made from it can
be judged.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pardemo.launch import Ranks
from pardemo.machine import Machine, machine
from pardemo.measure import calibrate_wrappers
from pardemo.measure.anatomy import decompose
from pardemo.measure.calibrate_parts import (
    IN_FLIGHT,
    LAYERS,
    PIECES,
    SHORT,
    LayerPart,
    adam,
    ddp,
    handed_round,
    piece,
    pieces,
)
from pardemo.measure.collectives import KINDS, Amid, collective
from pardemo.measure.flops import count_flops, peak_flops
from pardemo.measure.inside import Case
from pardemo.measure.rounds import Comparison, Progress, compare

SCHEMA = "pardemo-profile/1"
SIZES = (4096, 65536, 1048576, 8388608)
PARAMETERS = (10_000, 1_000_000)
LEAST_S = 1e-7  # a transfer that costs nothing that can be seen
BESIDE = ("all_reduce", "all_to_all")  # also timed while a rank computes: buckets and rings
AMID, SOON, HIDDEN = "", " soon", " beside"  # after a long piece, a short one, during a long one
HOW = {
    AMID: Amid(piece(), PIECES),
    SOON: Amid(piece(SHORT), PIECES),
    HIDDEN: Amid(piece(), PIECES, beside=True),
}
MOST_SOON = 1048576  # bytes; larger ones take longer than any gap
TURNS = 3  # of the pieces alone in a round: all else is told from their difference


def calibrate(
    *,
    ranks: Ranks | None = None,
    world_sizes: Sequence[int] | None = None,
    sizes: Sequence[int] = SIZES,
    kinds: Sequence[str] = KINDS,
    rounds: int = 6,
    budget_s: float = 20.0,
    name: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure this machine and return its profile.

    `world_sizes`: powers of two up to the group's size by default. The floor of `rounds` comes
    before the budget. Save it with json.dump, or load it into predict.
    """
    here = machine()
    with contextlib.ExitStack() as stack:
        if ranks is None:
            ranks = stack.enter_context(Ranks(max(2, here.devices), timeout=300))
        total = ranks.setup.nprocs
        worlds = list(world_sizes or [n for n in (2, 4, 8, 16) if n <= total] or [total])
        cases = _cases(worlds, sizes, kinds) if total > 1 else _cases([], sizes, kinds)
        how: dict[str, Any] = {"rounds": rounds, "max_rounds": 2 * rounds, "progress": progress}
        found = compare(cases, ranks=ranks, budget_s=budget_s, warmup=3, sample_s=0, **how)
        overlap = {"hidden_share": 0.0, "slowdown": 1.0}
        if total > 1:
            case = Case(ddp, ranks=min(total, max(2, here.devices)))
            parts = decompose(case, ranks=ranks, rounds=rounds, max_rounds=rounds, budget_s=4)
            overlap = _overlap(parts.exposed_s + max(parts.rest_s, 0.0), parts.communication_s)
            if not here.gpus and case.ranks >= here.devices:
                overlap["hidden_share"] = 0.0  # every core computes: what seems hidden is noise
    profile = _about(here, name, found.load)
    profile |= {
        "collectives": _collectives(found, kinds),
        "compute": _compute(found),
        "optimizer": _optimizer(found),
        "overlap": overlap,
        "launch": _launch(found, worlds if total > 1 else []),
    }
    smallest = [r["time_s"] for r in profile["collectives"] if r["collective"] == "all_reduce"]
    if smallest:
        profile["launch"]["collective_s"] = smallest[0]
    return profile


def _cases(worlds: Sequence[int], sizes: Sequence[int], kinds: Sequence[str]) -> dict[str, Case]:
    cases = {
        f"{kind} {n} {size}{how}": Case(handed_round(size), ranks=n)
        if kind == "broadcast" and how == AMID
        else collective(kind, size, ranks=n, amid=amid)
        for how, amid in HOW.items()
        for kind in kinds
        if how != HIDDEN or kind in BESIDE
        for n in worlds
        for size in sizes
        if how != SOON or size <= MOST_SOON
    }
    for n in worlds:
        for turn in range(TURNS):
            cases[f"pieces {n} {turn}"] = Case(pieces(), ranks=n)
            cases[f"pieces {n} {turn}{SOON}"] = Case(pieces(SHORT), ranks=n)
    for layer in LAYERS:
        cases[f"{layer} forward"] = Case(LayerPart(layer, backward=False))
        cases[f"{layer} both"] = Case(LayerPart(layer, backward=True))
    for count in PARAMETERS:
        cases[f"optimizer {count}"] = Case(adam(count))
    cases["nothing"] = Case(lambda mesh: lambda: None)
    if worlds:
        cases |= calibrate_wrappers.cases(worlds[0])
    return cases


def _about(here: Machine, name: str, load: Sequence[str]) -> dict[str, Any]:
    """Who, when and what: everything but the measurements."""
    today = datetime.date.today().isoformat()
    peaks = {"float32": float(peak_flops(threads=1))}
    if here.gpus:
        peaks["bfloat16"] = float(peak_flops(torch.bfloat16, sizes=(2048, 8192)))
    memory = float(here.memory_bytes) / here.devices
    if here.gpus:
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    link = 0.0
    card = {"card": here.card(), "devices": here.devices, "cores": here.cores, "cpu": here.cpu,
            "gpus": list(here.gpus), "torch": here.torch, "load": list(load)}  # fmt: skip
    return {
        "schema": SCHEMA,
        "name": name or "this-machine",
        "date": today,
        "source": f"pardemo.measure.calibrate on {here.cpu}",
        "machine": card,
        "per_node": here.devices,
        "memory_bytes": memory,
        "peak_flops": peaks,
        "peak_source": "measured",
        "memory_bandwidth": _memory_bandwidth(),
        "links": {"node": link, "network": 0.0},
    }


def _collectives(found: Comparison, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """What each operation adds to the pieces of computation around it, per operation.

    A mean, not a median: some take a tick of the kernel longer than others, and in a step with many
    of them it is the means that add up. Paired by round; never below what a curve can hold.
    """
    rows = []
    for name in found.timings:
        kind, *rest = name.split()
        if kind not in kinds:
            continue
        how = "".join(f" {word}" for word in rest[2:])
        count = IN_FLIGHT if kind == "broadcast" and how == AMID else PIECES
        alone = _pieces(found, int(rest[0]), how)
        each = [
            (float(np.mean(r)) - a) / count
            for r, a in zip(found.samples.rounds(name), alone, strict=True)
        ]
        least = LEAST_S
        if found[name].status == "contaminated":
            best = _least(found.samples.rounds(name)) - _least_pieces(found, int(rest[0]), how)
            least = max(LEAST_S, best / count)
        row: dict[str, Any] = {
            "collective": kind, "ranks": int(rest[0]), "nodes": 1, "size_bytes": int(rest[1]),
            "time_s": max(least, _middle_mean(each)), "status": found[name].status,
            "rounds_s": [max(LEAST_S, s) for s in each], "gap_s": _middle_mean(alone) / PIECES,
        }  # fmt: skip
        rows.append(row | ({"how": how.strip()} if how else {}))
    return rows


def _pieces(found: Comparison, ranks: int, how: str) -> list[float]:
    """Seconds of the pieces alone in every round, the mean of their turns."""
    turns = _turns(found, ranks, how)
    return [float(np.mean(np.concatenate(one))) for one in zip(*turns, strict=True)]


def _least_pieces(found: Comparison, ranks: int, how: str) -> float:
    """Seconds of the pieces alone in their least disturbed sample.

    On a busy machine pieces alone are slowed more than pieces with messages between them, and the
    difference of means says that messages cost nothing; that of the best samples does not.
    """
    return min(map(_least, _turns(found, ranks, how)))


def _turns(found: Comparison, ranks: int, how: str) -> list[list[NDArray[np.float64]]]:
    soon = SOON if how == SOON else ""
    return [found.samples.rounds(f"pieces {ranks} {turn}{soon}") for turn in range(TURNS)]


def _least(rounds: Sequence[NDArray[np.float64]]) -> float:
    return float(min(r.min() for r in rounds))


def _middle_mean(values: Sequence[float]) -> float:
    """The mean of all but a fifth at each end, which a disturbance may have made."""
    cut = len(values) // 5
    return float(np.sort(values)[cut : len(values) - cut].mean())


def _compute(found: Comparison) -> list[dict[str, Any]]:
    """Forward, and backward as the difference of paired rounds (never below zero)."""
    rows = []
    for layer in LAYERS:
        module, inputs = LAYERS[layer]()
        forward = found.samples.rounds(f"{layer} forward")
        both = found.samples.rounds(f"{layer} both")
        pairs = [
            (float(np.median(f)), max(0.0, float(np.median(b) - np.median(f))))
            for f, b in zip(forward, both, strict=True)
        ]
        flops = count_flops(lambda m=module, x=inputs: m(*x)).total  # type: ignore[misc]
        flops = flops or 8.0 * sum(t.numel() for t in inputs)  # norms: about 8 per element
        rows.append({
            "kind": layer.split()[0], "shape": layer.split()[1], "flops": flops,
            "forward_s": float(np.median([f for f, _ in pairs])),
            "backward_s": float(np.median([b for _, b in pairs])),
            "rounds_s": [list(pair) for pair in pairs],
        })  # fmt: skip
    return rows


def _optimizer(found: Comparison) -> dict[str, Any]:
    """AdamW's time as fixed + per parameter, from two sizes."""
    small, large = PARAMETERS
    few, many = found[f"optimizer {small}"].median_s, found[f"optimizer {large}"].median_s
    each = max(0.0, (many - few) / (large - small))
    return {"name": "AdamW", "seconds_per_parameter": each, "fixed_s": max(0.0, few - each * small)}


def _launch(found: Comparison, worlds: Sequence[int]) -> dict[str, float]:
    """What it costs to begin: an empty step, the smallest layer; and what wrappers add."""
    fixed = {"step_s": found["nothing"].median_s}
    fixed["microbatch_s"] = found["linear 1x16x16 both"].median_s
    return fixed | (calibrate_wrappers.constants(found) if worlds else {})


def _overlap(exposed_s: float, alone_s: float) -> dict[str, float]:
    """Hidden share of a DDP step's communication, and how much overlapping slowed things down."""
    hidden = 1 - exposed_s / alone_s if alone_s > 0 else 0.0
    return {
        "hidden_share": min(1.0, max(0.0, hidden)),
        "slowdown": max(1.0, exposed_s / alone_s) if alone_s > 0 else 1.0,
    }


def _memory_bandwidth() -> float:
    """Bytes per second of a large copy on one thread, reads and writes counted."""
    from torch.utils.benchmark import Timer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.ones(4_000_000, device=device) for _ in range(2))
    taken = Timer("a.copy_(b)", globals={"a": a, "b": b}, num_threads=1).blocked_autorange(
        min_run_time=0.1
    )
    return 2 * 16e6 / taken.median
