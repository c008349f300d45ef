"""Compare two recorded runs cell by cell: faster, slower, the same, or cannot tell."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from ..measure.timing import Ratio, Timing
from .store import CaseRow, RunRow, Store

ALIKE = 3  # cells that must move together before the machine is suspected


@dataclass(frozen=True)
class Cell:
    """One case that both runs have: time of B over time of A, with its 95 % interval."""

    name: str
    a_s: float
    b_s: float
    ratio: Ratio

    def regressed(self, threshold: float) -> bool:
        """Whether B is slower by more than `threshold` even at the near end of the interval."""
        return not self.ratio.refused and self.ratio.lo > 1 + threshold

    def __repr__(self) -> str:
        return (
            f"{self.name}: {self.ratio.verdict} ({self.a_s * 1e3:.3g} -> "
            f"{self.b_s * 1e3:.3g} ms; {self.ratio})"
        )


@dataclass(frozen=True)
class Difference:
    """Run B set against run A."""

    a: RunRow
    b: RunRow
    cells: tuple[Cell, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def notes(self) -> list[str]:
        """What makes the two runs hard to compare."""
        said = ["two sessions: a machine slower on one of the two days would look like a change"]
        if self.a.machine != self.b.machine:
            said.append("made on different machines: this compares machines, not code")
        changed = [
            key for key in sorted({*self.a.parameters, *self.b.parameters})
            if self.a.parameters.get(key) != self.b.parameters.get(key)
        ]  # fmt: skip
        if changed:
            said.append(f"parameters differ: {', '.join(changed)}")
        if self.common is not None:
            said.append(
                f"all {len(self.judged)} cells moved alike, by a factor of {self.common:.2f}: more "
                "like another day of the machine, or something that all share, than one strategy"
            )
        if not self.judged:
            said.append("nothing was judged: no cell of both runs has a ratio that holds")
        return said

    @property
    def judged(self) -> list[Cell]:
        """The cells whose ratio is not refused."""
        return [cell for cell in self.cells if not cell.ratio.refused]

    @property
    def common(self) -> float | None:
        """The factor by which all cells moved, where one factor explains at least three; or None.

        Two sessions cannot be interleaved, so that a slower machine and slower code look alike in
        one cell; they differ in whether the other cells moved too.
        """
        found = [cell.ratio for cell in self.judged]
        if len(found) < ALIKE:
            return None
        factor = float(np.exp(np.median([np.log(ratio.value) for ratio in found])))
        moved = all(ratio.different and ratio.lo <= factor <= ratio.hi for ratio in found)
        return factor if moved else None

    def regressions(self, threshold: float) -> list[Cell]:
        """The cells that are surely slower than the threshold allows."""
        return [cell for cell in self.cells if cell.regressed(threshold)]

    def __repr__(self) -> str:
        lines = [f"B = {self.b.id} against A = {self.a.id}"]
        lines += [f"  {cell!r}" for cell in self.cells]
        lines += [f"  only in A: {name}" for name in self.only_a]
        lines += [f"  only in B: {name}" for name in self.only_b]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def compare(store: Store, a: RunRow, b: RunRow) -> Difference:
    """Set every case with samples that both runs finished side by side."""
    old = {key(case): case for case in store.cases(a.id)}
    new = {key(case): case for case in store.cases(b.id)}
    cells = []
    for name in [name for name in old if name in new]:
        first, second = timing(store, old[name], "A"), timing(store, new[name], "B")
        if first is not None and second is not None:
            cells.append(Cell(name, first.median_s, second.median_s, second.ratio(first)))
    return Difference(
        a, b, tuple(cells), tuple(n for n in old if n not in new),
        tuple(n for n in new if n not in old),
    )  # fmt: skip


def key(case: CaseRow) -> str:
    """The name of a cell: the case, with its repeat when it is not the first."""
    return case.name + (f" #{case.repeat}" if case.repeat else "")


def timing(store: Store, case: CaseRow, label: str = "") -> Timing | None:
    """The Timing of a recorded case from its raw samples, warm-up left out; None without any."""
    rounds: dict[int, list[float]] = {}
    for sample in store.samples(case.run, case.name, case.repeat):
        if sample.phase == "measure":
            rounds.setdefault(sample.round, []).append(sample.seconds)
    if not rounds:
        return None
    values = case.values
    made = Timing.of(
        [rounds[number] for number in sorted(rounds)],
        ranks=int(values.get("ranks") or 1),
        threads=int(values.get("threads") or 1),
        label=label or case.name,
    )
    return dataclasses.replace(
        made,
        status=values.get("status", made.status),
        warnings=tuple(values.get("warnings", made.warnings)),
        taken=values.get("taken"),
    )
