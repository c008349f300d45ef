"""decompose(): where the time of a step goes. Compute, exposed transfer, idle, and the remainder.

Three variants of one case are compared in interleaved rounds: the real step, the same step with
its communication silenced (quiet.py), and its communication alone (replay.py). From them, in every
round and for every rank:

    compute     the silenced step: what the rank needs when nobody makes it wait
    slept       how long its main thread slept in the real step and not in the silenced one (wall -
                CPU - run queue), with its wait for the slowest rank at the end
    idle        what it slept longer than the rank that slept least (waiting for slower ranks), and
                what all of them slept beyond the communication alone (a pipeline's bubble); at most
                what the step takes longer than the silenced one
    exposed     step - compute - idle: by ablation, all that communication costs, be it sleep, work
                of the rank's own thread for it, or computation that it slows down (`contended`)
    overlapped  communication alone - exposed; negative where it costs more than it takes alone

So the parts add up in every round. The result is the rounds' spatial median, a weighted mean of
rounds, in which they still do. What is left against the headline, the median of all samples, is
`rest`: within 2 % of the step, or `missing` says why not.

On GPUs the host thread sleeps for other reasons, so idle is each rank's lead over the slowest in
the silenced step, and a bubble counts as exposed; it says so.
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
    `contended_s`: the part of exposed in which ranks did not sleep, but worked longer or waited for
    a core beside their own communication.
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
    contended_s: float = 0.0
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
            f"{milliseconds(self.communication_s)}, so "
        )
        if self.overlapped_s >= 0:
            text += f"{milliseconds(self.overlapped_s)} is hidden"
        else:
            text += f"it costs {milliseconds(-self.overlapped_s)} more than it takes"
        if self.contended_s > ADDS_UP * self.step_s:
            text += (
                f"\n  {milliseconds(self.contended_s)} of the exposed transfer is no waiting: "
                "communication slows the computation beside it, or needs the rank's own thread"
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
        slept = alone.max(axis=1, keepdims=True) - alone
    else:
        sleeping = [b.blocked_s + b.step_s - b.wall_s for b in real]
        without = np.array([np.median(b.blocked_s, axis=1) for b in silenced])
        slept = np.array([np.median(s, axis=1) for s in sleeping]) - without
    slept = np.maximum(slept, 0.0)
    shared = slept.min(axis=1, keepdims=True)
    idle = slept - shared + np.maximum(shared - transfer[:, None], 0.0)
    lost_here = step[:, None] - alone
    idle = np.minimum(idle, np.maximum(lost_here, 0.0))  # nobody idles longer than is lost
    exposed = lost_here - idle
    if transfer.max() <= 0 or found["real"].ranks == 1:
        exposed = np.zeros_like(idle)
    contended = np.zeros_like(idle) if on_gpu else np.maximum(step[:, None] - alone - slept, 0.0)
    contended = np.minimum(contended, np.maximum(exposed, 0.0))
    return _summary(found, [alone, exposed, idle, contended], lost, transfer, on_gpu)


def _summary(
    found: Comparison, parts: list[Floats], lost: Floats, transfer: Floats, on_gpu: bool
) -> Anatomy:
    """The typical round of `parts`, arrays (round, rank), and what is missing, in words."""
    weights = statistics.typical_weights(np.concatenate(parts[:3], axis=1))
    middle = np.array([weights @ part for part in parts])  # part, rank
    step_s = found["real"].median_s
    shares = tuple(
        Share(rank, *map(float, of[:3]), float(step_s - of[:3].sum()))  # type: ignore[call-arg, misc]
        for rank, of in enumerate(middle.T)
    )
    compute_s, exposed_s, idle_s, contended_s = map(float, middle.mean(axis=1))
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
        contended_s=contended_s,
        comparison=found,
    )


def _missing(found: Comparison, rest_s: float, step_s: float, on_gpu: bool) -> str:
    """Why compute + exposed + idle is not the step; empty when it is."""
    if abs(rest_s) <= ADDS_UP * step_s:
        return "on GPUs a pipeline's bubble counts as exposed transfer" if on_gpu else ""
    sign = "unaccounted for" if rest_s > 0 else "counted twice"
    said = f"does not add up: {milliseconds(abs(rest_s))} ({abs(rest_s) / step_s:.0%}) {sign}; "
    said += f"the typical round took {milliseconds(step_s - rest_s)}, the median of all samples is "
    said += milliseconds(step_s)
    if found["real"].status != "ok" or found["silenced"].status != "ok":
        said += ": the times were too unsteady, more rounds or a quieter machine would help"
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
