"""What a step would take without some of its causes, and what each cause costs.

A step ends when its slowest rank has worked, got its batch and its core, and has then communicated:
max over ranks (work + data + pushed) + transfer. A cause is a change of those parts. What it costs
is its Shapley value (1953): the time its removal saves, averaged over all orders of removal. So the
costs of all causes add up to what is saved when all are removed, and causes that hide each other
(a starved rank behind a slow one) share what they cost together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import factorial

import numpy as np
from numpy.typing import NDArray

from pardemo.measure.observe import Run

Floats = NDArray[np.float64]


@dataclass
class Parts:
    """Where the time of each step went: arrays (ranks, steps), of transfer (steps,), in seconds.

    The transfer is that of the rank which waits least: what others wait longer, they wait for it.
    `gradients` is what DDP's backward waits for, `small` the script's own short collectives.
    """

    work: Floats
    data: Floats
    pushed: Floats
    gradients: Floats
    small: Floats
    rest: Floats

    @classmethod
    def of(cls, run: Run) -> Parts:
        """Read them from an observed run."""
        waits = run.table("communication_s")
        least, steps = waits.argmin(axis=0), np.arange(waits.shape[1])
        gradients, small = (run.table(what)[least, steps] for what in ("drained_s", "small_s"))
        rest = np.maximum(0.0, waits[least, steps] - gradients - small)
        pushed, own = run.table("pushed_s"), run.table("own_s")
        pushed = np.minimum(pushed, own)
        return cls(own - pushed, run.table("data_s"), pushed, gradients, small, rest)

    def copy(self) -> Parts:
        """The same numbers in arrays of their own."""
        return Parts(*(getattr(self, name).copy() for name in self.__dataclass_fields__))

    @property
    def transfer(self) -> Floats:
        """All communication of the rank that waits least, by step."""
        return self.gradients + self.small + self.rest

    def step_s(self) -> float:
        """Median over steps."""
        ready = (self.work + self.data + self.pushed).max(axis=0)
        return float(np.median(ready + self.transfer))

    def without(self, removals: Sequence[Removal]) -> Parts:
        """What would be left."""
        left = self.copy()
        for remove in removals:
            remove(left)
        return left


Removal = Callable[[Parts], None]


@dataclass(frozen=True)
class Suspect:
    """A cause whose sign was seen, and what its removal does to the parts of a step.

    `certain`: the sign is a fact of the script and not only a time, so it is named at any cost.
    """

    cause: str
    evidence: str
    remedy: str
    remove: Removal
    certain: bool = False


def costs(parts: Parts, removals: Sequence[Removal]) -> list[float]:
    """Seconds per step that each cause accounts for; never negative."""
    n = len(removals)
    left = {
        chosen: parts.without([removals[i] for i in chosen]).step_s()
        for size in range(n + 1)
        for chosen in combinations(range(n), size)
    }
    found = []
    for i in range(n):
        total = 0.0
        for chosen in left:
            if i in chosen:
                before = tuple(j for j in chosen if j != i)
                orders = factorial(len(before)) * factorial(n - len(chosen)) / factorial(n)
                total += orders * (left[before] - left[chosen])
        found.append(max(0.0, total))
    return found
