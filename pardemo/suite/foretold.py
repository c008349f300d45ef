"""Predictions of several strategies at once: before they are run, and from parts of their rounds.

A machine that others use too, or that warms up, has a speed of the minute. So the suite says every
prediction before a step is timed, and times the same parts again in the rounds of the steps: from
these comes the prediction that stands beside the measurement. Neither sees a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pardemo.launch import Ranks
from pardemo.machine import machine
from pardemo.measure import Case, Comparison
from pardemo.predict import Prediction, Profile
from pardemo.workloads import Workload

from . import foresee
from .scene import Scene

Said = dict[str, Prediction | str]  # or why there is none, in words


@dataclass(frozen=True)
class Foresight:
    """The strategies of one scene that can be predicted on a calibrated machine."""

    scene: Scene
    names: tuple[str, ...]
    profile: Profile
    devices: int

    @property
    def predictable(self) -> list[str]:
        """Names whose step is predicted: those on one axis."""
        return [name for name in self.names if name not in foresee.MESHES]

    def cases(self) -> dict[str, Case]:
        """The parts, to be timed among the steps."""
        return foresee.part_cases(self.scene, self.predictable) if self.predictable else {}

    def before(self, ranks: Ranks, budget_s: float) -> tuple[foresee.Parts, Said]:
        """Time the parts now, and predict every strategy from them."""
        parts = foresee.measure_parts(self.scene, self.predictable, ranks, budget_s)
        return parts, self.said(parts)

    def beside(self, found: Comparison) -> Said:
        """Predict again from the parts that were timed in the rounds of `found`."""
        return self.said(foresee.read_parts(self.scene, self.predictable, found))

    def said(self, parts: foresee.Parts) -> Said:
        """Every strategy's prediction from these parts."""
        known = self.profile
        return {
            name: foresee.predicted(name, self.scene, parts, known, self.devices)
            for name in self.names
        }


def foresight(
    names: Sequence[str], scene: Scene, ranks: Ranks, profile: Profile | str | None = None
) -> Foresight:
    """Make ready to predict `names`; `profile` is a machine (default: calibrate this one now)."""
    known = foresee.known_machine(profile, ranks, foresee.kinds_sent(scene, names))
    return Foresight(scene, tuple(names), known, machine().devices)


def foretell(
    names: Sequence[str], work: Workload, ranks: Ranks, batch_size: int = 0,
    profile: Profile | str | None = None, budget_s: float = 10.0,
) -> Said:  # fmt: skip
    """Predict a step of each strategy on `ranks` before it is run, from parts measured alone.

    `profile` is a calibrated machine (default: calibrate now); the parts take `budget_s` seconds. A
    strategy that cannot be predicted gets the reason, in words.
    """
    backend = machine().backend
    scene = Scene(work, ranks.setup.nprocs, batch_size or work.batch_size, backend)
    return foresight(names, scene, ranks, profile).before(ranks, budget_s)[1]


def numbers(one: Prediction | str | None) -> dict[str, float | None]:
    """A prediction as facts of a row: value, low and high end in seconds; none without one."""
    if not isinstance(one, Prediction):
        return {}
    return {"predicted_s": one.value, "predicted_lo_s": one.lo, "predicted_hi_s": one.hi}


def drift(before: Said, beside: Said, found: Comparison) -> list[str]:
    """One line: how far off the predictions were that were said first, and those beside the steps.

    Nothing when no strategy has both.
    """
    errors = [
        (abs(first.value / found[name].median_s - 1), abs(then.value / found[name].median_s - 1))
        for name, first in before.items()
        if isinstance(first, Prediction) and isinstance(then := beside[name], Prediction)
    ]
    if not errors:
        return []
    first, then = np.median(errors, axis=0)
    return [
        f"predictions: median error {first:.0%} as said before any step was timed, {then:.0%} with "
        "the same parts timed in the rounds of the steps"
    ]
