"""Timing and Ratio: numbers that say how far they can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from pardemo.measure import statistics
from pardemo.measure.evidence import WORTH_SAYING

Status = Literal["ok", "noisy", "contaminated", "oversubscribed"]

NOISY = 0.10  # IQR / median; the two thresholds of torch.utils.benchmark
CONTAMINATED = 0.25

# What somebody else's share of the cores does to a ratio, from simulated bursts of stolen time
# (tests/measure/test_disturbance.py). Variants on equally many cores: nothing, the paired interval
# covers. On differently many: the one with more ranks waits for more unlucky ones, and looks slower
# by at most that share for each core it has more; so the interval is widened by it.
TOO_WIDE = 3.0  # high over low end of a ratio's interval: beyond, it says nothing
DISTURBED = 0.10  # above, a cell is called contaminated
HOPELESS = 0.25  # above, the machine was too busy for any ratio


def milliseconds(seconds: float) -> str:
    """Seconds as text with three digits that matter: 0.0742 -> '74.2 ms', 2e-5 -> '0.02 ms'."""
    if not math.isfinite(seconds):
        return "?"
    value = seconds * 1e3
    decimals = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{decimals}f}"
    return (text.rstrip("0").rstrip(".") if decimals > 2 else text) + " ms"


@dataclass(frozen=True)
class Ratio:
    """One time over another: below 1 the first is faster. `refused` says why it may not be used.

    `value` is the ratio of the pooled medians, `lo` and `hi` its 95 % interval; `paired` tells
    whether rounds were compared with the rounds they were interleaved with, `note` what widened it.
    """

    value: float
    lo: float
    hi: float
    rounds: int
    paired: bool
    names: tuple[str, str] = ("this", "that")
    refused: str = ""
    note: str = ""

    @property
    def different(self) -> bool:
        """Whether the interval excludes 1 (never when the ratio is refused)."""
        return not self.refused and not self.lo <= 1 <= self.hi

    @property
    def verdict(self) -> Literal["faster", "slower", "the same", "cannot tell"]:
        """In a word; "the same" needs an interval within 5 % of 1, else it is "cannot tell"."""
        if self.refused:
            return "cannot tell"
        if self.different:
            return "faster" if self.value < 1 else "slower"
        return "the same" if self.lo > 1 / 1.05 and self.hi < 1.05 else "cannot tell"

    @property
    def speedup(self) -> float:
        """How many times as fast the first is: 1 / value."""
        return 1 / self.value

    def __repr__(self) -> str:
        first, second = self.names
        if self.refused:
            return f"no ratio of {first} to {second}: {self.refused}"
        words = {
            "faster": f"{first} is {1 / self.value:.2f}x as fast as {second}",
            "slower": f"{first} takes {self.value:.2f}x the time of {second}",
            "the same": f"{first} and {second} take the same time within 5 %",
            "cannot tell": f"cannot tell {first} from {second}",
        }[self.verdict]
        how = "paired rounds" if self.paired else "rounds of separate sessions"
        return (
            f"{words} (time ratio {self.value:.3f}, 95 % interval {self.lo:.3f}-{self.hi:.3f}, "
            f"{self.rounds} {how}){'; ' + self.note if self.note else ''}"
        )


@dataclass(frozen=True)
class Timing:
    """The time of one step: pooled median, 95 % interval over rounds, spread, and its standing.

    `iterations` is samples per round, each of `steps` steps in a row; `samples` keeps every round's
    seconds per step (maximum over ranks).
    Two timings with the same non-empty `session` were interleaved and are compared round by round.
    `taken` is the share of the needed core time that others had (None: not known).
    """

    median_s: float
    lo_s: float
    hi_s: float
    p10_s: float
    p90_s: float
    iqr_rel: float
    rounds: int
    iterations: int
    ranks: int = 1
    threads: int = 1
    status: Status = "ok"
    warnings: tuple[str, ...] = ()
    label: str = ""
    session: str = field(default="", repr=False)
    taken: float | None = field(default=None, repr=False)
    steps: int = 1
    samples: tuple[tuple[float, ...], ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def of(
        cls,
        rounds: Sequence[ArrayLike],
        *,
        ranks: int = 1,
        threads: int = 1,
        cores: int | None = None,
        load: Sequence[str] = (),
        taken: float | None = None,
        label: str = "",
        session: str = "",
        steps: int = 1,
    ) -> Timing:
        """Summarise rounds of times in seconds.

        `cores` (devices on a GPU machine) lets it see oversubscription; `load` says in words who
        else used the cores, `taken` how much (evidence.Toll); load of unknown size contaminates.
        """
        arrays = statistics.clean(rounds)
        lo, hi = statistics.interval(arrays)
        p10, p90, iqr_rel = statistics.spread(arrays)
        if taken is None and load:
            taken = 1.0
        status, warnings = _standing(arrays, iqr_rel, ranks * threads, cores, load, taken or 0.0)
        return cls(
            median_s=statistics.pooled_median(arrays),
            lo_s=lo,
            hi_s=hi,
            p10_s=p10,
            p90_s=p90,
            iqr_rel=iqr_rel,
            rounds=len(arrays),
            iterations=max(len(a) for a in arrays),
            ranks=ranks,
            threads=threads,
            status=status,
            warnings=warnings,
            label=label,
            session=session,
            taken=taken,
            steps=steps,
            samples=tuple(tuple(map(float, a)) for a in arrays),
        )

    @property
    def precision(self) -> float:
        """Half the interval over the median; infinite when there is no interval."""
        if not math.isfinite(self.hi_s):
            return math.inf
        return (self.hi_s - self.lo_s) / 2 / self.median_s

    def ratio(self, other: Timing) -> Ratio:
        """This time over the other's, paired by round where both were interleaved."""
        names = (self.label or "this", other.label or "that")
        paired = bool(self.session) and self.session == other.session
        paired = paired and self.rounds == other.rounds
        fewest = min(self.rounds, other.rounds)
        refused, note = _refusal(self, other, names, fewest, paired), ""
        if fewest < 2:
            value, lo, hi = self.median_s / other.median_s, math.nan, math.nan
        elif paired:
            value, lo, hi = statistics.paired_ratio(self.samples, other.samples)
        else:
            value, lo, hi = statistics.unpaired_ratio(self.samples, other.samples)
        if not refused:
            lo, hi, note = _allowance(self, other, lo, hi)
            if hi / lo > TOO_WIDE:
                refused = f"the rounds disagree: anywhere between {lo:.2f} and {hi:.2f}"
        return Ratio(value, lo, hi, fewest, paired, names, refused, note)

    def __repr__(self) -> str:
        name = f"{self.label}: " if self.label else ""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        sure = f"95 % interval {self.lo_s * 1e3:.3g}-{self.hi_s * 1e3:.3g}"
        if not math.isfinite(self.hi_s):
            sure = "no interval"
        of = f" samples of {self.steps} steps" if self.steps > 1 else ""
        text = (
            f"{name}{milliseconds(self.median_s)} ({sure}, p10-p90 {self.p10_s * 1e3:.3g}-"
            f"{self.p90_s * 1e3:.3g}, {self.rounds} round{'s' if self.rounds > 1 else ''} x "
            f"{self.iterations}{of}, {self.ranks} rank{'s' if self.ranks > 1 else ''} x {threads})"
        )
        if self.status != "ok":
            text += f" {self.status.upper()}"
        return text + (": " + "; ".join(self.warnings) if self.warnings else "")


def _standing(
    arrays: list[np.ndarray],
    iqr_rel: float,
    wanted: int,
    cores: int | None,
    load: Sequence[str],
    taken: float,
) -> tuple[Status, tuple[str, ...]]:
    """The label of a cell and the sentences behind it; the gravest label wins."""
    status: Status = "ok"
    said: list[str] = []
    if len(arrays) < statistics.MIN_ROUNDS:
        said.append(f"{len(arrays)} of at least {statistics.MIN_ROUNDS} rounds: no ratio from it")
    if iqr_rel > NOISY:
        status = "contaminated" if iqr_rel > CONTAMINATED else "noisy"
        said.append(f"IQR/median {iqr_rel:.2f}")
    said.extend(load)
    if taken > DISTURBED:
        status = "contaminated"
    if cores is not None and wanted > cores:
        status = "oversubscribed"
        said.append(f"{wanted} ranks x threads on {cores} devices: no speed-up is claimed from it")
    return status, tuple(said)


def _refusal(top: Timing, bottom: Timing, names: tuple[str, str], fewest: int, paired: bool) -> str:
    """Why this ratio may not be used, or the empty string.

    A wide spread alone refuses nothing where rounds are paired: the interval carries it.
    """
    for timing, name in zip((top, bottom), names, strict=True):
        hopeless = (timing.taken or 0.0) > HOPELESS
        if not paired:
            hopeless |= timing.status == "contaminated"
        if hopeless or timing.status == "oversubscribed":
            status = "contaminated" if timing.status != "oversubscribed" else timing.status
            why = "; ".join(timing.warnings)
            return f"{name} was {status} ({why}), so the ratio would say nothing"
    if fewest < statistics.MIN_ROUNDS:
        return f"only {fewest} rounds, and {statistics.MIN_ROUNDS} are needed to say anything"
    return ""


def _allowance(top: Timing, bottom: Timing, lo: float, hi: float) -> tuple[float, float, str]:
    """The interval, widened by what disturbance may have added to the variant with more cores."""
    more = top.ranks * top.threads - bottom.ranks * bottom.threads
    taken = max(top.taken or 0.0, bottom.taken or 0.0)
    if more == 0 or taken <= WORTH_SAYING:
        return lo, hi, ""
    factor = 1 + taken * abs(more)
    note = f"one side widened by {factor - 1:.0%}: others took {taken:.0%} of the cores' time"
    return (lo / factor, hi, note) if more > 0 else (lo, hi * factor, note)
