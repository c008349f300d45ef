"""decompose(): where the time of a step goes. Compute, exposed transfer, idle, and the remainder.

Three variants of one case are compared in interleaved rounds: the real step, the same step with
its communication silenced (quiet.py), and its communication alone (replay.py). From them:

    lost        T(real) - T(silenced), paired by round: all that communication costs
    compute     what each rank needs when nobody makes it wait (the silenced step)
    blocked     how long each rank's main thread slept in the real step: wall - CPU - run queue,
                plus its wait for the slowest rank at the end. A second, independent measurement
    exposed     the part of blocked that is transfer: what the least blocked rank still slept, at
                most the communication alone
    idle        the rest of blocked: pipeline bubble, waiting for slower ranks
    overlapped  communication alone - exposed; negative where ranks share their cores with it
    rest        step - compute - exposed - idle. Within 2 % of the step, or `missing` says why not

On GPUs the host thread sleeps for other reasons, so blocked is taken to be `lost` plus each rank's
lead over the slowest, and the remainder is zero by construction; it says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pardemo.launch import Ranks
from pardemo.measure import statistics
from pardemo.measure.inside import Case, Step
from pardemo.measure.quiet import finding_ddp, hush, quiet
from pardemo.measure.replay import replay
from pardemo.measure.rounds import Comparison, compare
from pardemo.measure.timing import Timing, milliseconds
from pardemo.measure.traffic import Counting

ADDS_UP = 0.02

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Share:
    """One rank's part of the step, in seconds: they add up to the step less `rest_s`."""

    rank: int
    compute_s: float
    exposed_s: float
    idle_s: float
    rest_s: float


@dataclass(frozen=True)
class Anatomy:
    """Where the step's time went (mean over ranks, medians over rounds), and whether it adds up.

    `lost_lo_s, lost_hi_s`: 95 % interval of what communication costs, paired by round.
    `last[rank]`: share of iterations in which that rank, left alone, finished last.
    """

    step_s: float
    compute_s: float
    exposed_s: float
    overlapped_s: float
    idle_s: float
    rest_s: float
    lost_s: float
    lost_lo_s: float
    lost_hi_s: float
    communication_s: float
    shares: tuple[Share, ...]
    last: tuple[float, ...]
    timing: Timing
    missing: str = ""
    comparison: Comparison | None = field(default=None, repr=False, compare=False)

    @property
    def adds_up(self) -> bool:
        """Whether compute + exposed + idle is the step within 2 %."""
        return abs(self.rest_s) <= ADDS_UP * self.step_s

    def __repr__(self) -> str:
        parts = [("compute", self.compute_s), ("exposed transfer", self.exposed_s)]
        parts += [("idle", self.idle_s), ("rest", self.rest_s)]
        said = ", ".join(f"{name} {milliseconds(s)} ({s / self.step_s:.0%})" for name, s in parts)
        text = f"{self.timing.label or 'step'} {milliseconds(self.step_s)} = {said}"
        text += (
            f"\n  communication costs {milliseconds(self.lost_s)} (95 % interval "
            f"{milliseconds(self.lost_lo_s)} to {milliseconds(self.lost_hi_s)}); alone it takes "
            f"{milliseconds(self.communication_s)}, so {milliseconds(self.overlapped_s)} is hidden"
        )
        slowest = int(np.argmax(self.last))
        if len(self.last) > 1:
            text += f"\n  rank {slowest} is the last in {self.last[slowest]:.0%} of the steps"
        if self.missing:
            text += f"\n  {self.missing}"
        if self.timing.status != "ok":
            text += f"\n  {self.timing.status.upper()}: {'; '.join(self.timing.warnings)}"
        return text


def decompose(case: Case, *, ranks: Ranks | None = None, **how: Any) -> Anatomy:
    """Take the step of `case` apart; `how` goes to compare(). Builds the case three times.

    The step must do the same work whatever it receives: one that branches on received values
    (a token count, say) cannot be silenced, and fails inside.
    """
    cases = {
        "real": case,
        "silenced": replace(case, make=_silenced(case.make), label="silenced"),
        "transfer": replace(case, make=_transfer(case.make), label="communication alone"),
    }
    return take_apart(compare(cases, ranks=ranks, **how))


def take_apart(found: Comparison) -> Anatomy:
    """The anatomy from a comparison of "real", "silenced" and "transfer"."""
    real, silenced = found.samples.of("real"), found.samples.of("silenced")
    transfer = _per_round([block.step_s for block in found.samples.of("transfer")])
    step = _per_round([block.step_s for block in real])
    alone = np.array([np.median(block.wall_s, axis=1) for block in silenced])  # round, rank
    lost = step - _per_round([block.step_s for block in silenced])
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        blocked = lost[:, None] + alone.max(axis=1, keepdims=True) - alone
    else:
        slept = [b.blocked_s + b.step_s - b.wall_s for b in real]
        without = np.array([np.median(b.blocked_s, axis=1) for b in silenced])
        blocked = np.array([np.median(s, axis=1) for s in slept]) - without
    blocked = np.maximum(blocked, 0.0)
    exposed = np.minimum(blocked.min(axis=1), transfer)[:, None] * np.ones_like(blocked)
    if transfer.max() <= 0 or found["real"].ranks == 1:
        exposed = np.zeros_like(blocked)
    idle = blocked - exposed
    rest = step[:, None] - alone - blocked
    return _summary(found, step, alone, exposed, idle, rest, lost, transfer, on_gpu)


def _summary(
    found: Comparison,
    step: Floats,
    alone: Floats,
    exposed: Floats,
    idle: Floats,
    rest: Floats,
    lost: Floats,
    transfer: Floats,
    on_gpu: bool,
) -> Anatomy:
    """Medians over rounds of arrays (round, rank), and what is missing, in words."""
    middle = np.array([np.median(part, axis=0) for part in (alone, exposed, idle)])  # part, rank
    step_s = float(np.median(step))
    shares = tuple(
        Share(rank, *map(float, parts), float(step_s - parts.sum()))  # type: ignore[call-arg, misc]
        for rank, parts in enumerate(middle.T)
    )
    compute_s, exposed_s, idle_s = map(float, middle.mean(axis=1))
    rest_s = step_s - compute_s - exposed_s - idle_s
    communication_s = float(np.median(transfer))
    lo, hi = statistics.centre_interval(lost)
    return Anatomy(
        step_s=step_s,
        compute_s=compute_s,
        exposed_s=exposed_s,
        overlapped_s=communication_s - exposed_s,
        idle_s=idle_s,
        rest_s=rest_s,
        lost_s=float(np.median(lost)),
        lost_lo_s=lo,
        lost_hi_s=hi,
        communication_s=communication_s,
        shares=shares,
        last=_last(found),
        timing=found["real"],
        missing=_missing(found, rest_s, step_s, on_gpu),
        comparison=found,
    )


def _missing(found: Comparison, rest_s: float, step_s: float, on_gpu: bool) -> str:
    """Why compute + exposed + idle is not the step; empty when it is."""
    if on_gpu:
        return "the remainder is zero by construction: on GPUs only the ablation is measured"
    if abs(rest_s) <= ADDS_UP * step_s:
        return ""
    sign = "unaccounted for" if rest_s > 0 else "counted twice"
    queued = found.samples.waited("real") * step_s
    calm = found.samples.waited("silenced") * found["silenced"].median_s
    said = f"does not add up: {milliseconds(abs(rest_s))} ({abs(rest_s) / step_s:.0%}) {sign}"
    if rest_s > 0 and queued - calm > 0.3 * rest_s:
        said += (
            f"; ranks waited {milliseconds(queued - calm)} longer for a core than without "
            "communication, whose threads need the same cores"
        )
    elif found["real"].status != "ok" or found["silenced"].status != "ok":
        said += "; the times were too unsteady to add up"
    else:
        said += "; communication slows the computation beside it"
    return said


def _last(found: Comparison) -> tuple[float, ...]:
    """Share of iterations in which each rank finished last when nobody waited for anybody."""
    walls = np.concatenate([block.wall_s for block in found.samples.of("silenced")], axis=1)
    counts = np.bincount(walls.argmax(axis=0), minlength=walls.shape[0])
    return tuple(float(c) for c in counts / walls.shape[1])


def _per_round(rounds: list[Floats]) -> Floats:
    return np.array([np.median(times) for times in rounds])


def _silenced(make: Callable[[Any], Step]) -> Callable[[Any], Step]:
    """The same case, with its communication silenced after two real steps."""

    def build(mesh: Any) -> Step:
        with finding_ddp() as modules:
            step = make(mesh)
        for _ in range(2):  # set-up exchanges need true answers
            step()
        for module in modules:
            hush(module)

        def silent() -> None:
            with quiet():
                step()

        return silent

    return build


def _transfer(make: Callable[[Any], Step]) -> Callable[[Any], Step]:
    """The communication of the same case by itself: counted once, then replayed."""

    def build(mesh: Any) -> Step:
        step = make(mesh)
        for _ in range(2):
            step()
        with Counting() as counting:
            step()
        return replay(counting.calls)

    return build
