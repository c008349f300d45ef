"""Strong and weak scaling of one strategy, against both baselines, in interleaved rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pardemo import records, strategies
from pardemo.launch import Ranks
from pardemo.machine import machine
from pardemo.measure import Case, Comparison, Ratio, Timing, compare
from pardemo.workloads import Workload
from pardemo.workloads import workload as find_workload

from . import inside, keep
from .run import WAIT_S, every_fourth
from .table import ALL, ONE

Kind = Literal["strong", "weak"]


@dataclass(frozen=True)
class Point:
    """One number of ranks: `speedup` over one rank (strong), or efficiency (weak)."""

    name: str
    ranks: int
    threads: int
    batch_size: int
    step: Timing
    ratio: Ratio | None
    oversubscribed: bool

    @property
    def speedup(self) -> float:
        """Time of one rank over this time: the median's, also where no claim is made of it."""
        return 1.0 if self.ratio is None else 1 / self.ratio.value

    @property
    def lo(self) -> float | None:
        """Lower end of the 95 % interval, None where the ratio was refused."""
        return None if self.ratio is None or self.ratio.refused else 1 / self.ratio.hi

    @property
    def hi(self) -> float | None:
        """Upper end."""
        return None if self.ratio is None or self.ratio.refused else 1 / self.ratio.lo

    @property
    def refused(self) -> str:
        """Why no speed-up is claimed here; "" when one is."""
        return "" if self.ratio is None else self.ratio.refused


@dataclass(frozen=True)
class Scaling:
    """All points of one strategy; prints as a table, feeds plot.scaling."""

    kind: Kind
    strategy: str
    workload: str
    points: tuple[Point, ...]
    skipped: tuple[str, ...] = ()

    @property
    def rows(self) -> tuple[Point, ...]:
        """For plot.scaling."""
        return self.points

    def __repr__(self) -> str:
        what = "speed-up" if self.kind == "strong" else "efficiency"
        lines = [f"{self.kind} scaling of {self.strategy} on {self.workload}"]
        lines.append(f"{'':20}{'ranks':>6}{'batch':>7}{'step [ms]':>11}{what:>11}  95 % interval")
        for p in self.points:
            sure = "" if p.lo is None else f"{p.lo:.2f}-{p.hi:.2f}"
            flag = " OVERSUBSCRIBED" if p.oversubscribed else " refused" if p.refused else ""
            lines.append(
                f"{p.name:20}{p.ranks:>6}{p.batch_size:>7}{p.step.median_s * 1e3:>11.3g}"
                f"{p.speedup:>11.2f}  {sure}{flag}"
            )
        return "\n".join([*lines, *self.skipped])

    def claim(self) -> tuple[str, str]:
        """The caption: what the largest sound point says, then the conditions."""
        sound = [p for p in self.points if p.name == self.strategy and not p.refused and p.ratio]
        what = "speed-up" if self.kind == "strong" else "efficiency"
        said = f"{self.workload}; hollow points have more ranks than devices: no claim is made."
        if not sound:
            return f"No {what} can be claimed from this run.", said
        best = max(sound, key=lambda p: p.ranks)
        ideal = best.ranks if self.kind == "strong" else 1
        claim = (
            f"On {best.ranks} ranks {self.strategy} reaches {what} {best.speedup:.2f} of {ideal} "
            f"({best.lo:.2f} to {best.hi:.2f})."
        )
        return claim, said

    def doubts(self) -> list[str]:
        """Why points should not be believed, each reason once."""
        said = [f"{p.name} on {p.ranks} ranks: {p.refused}" for p in self.points if p.refused]
        return [*dict.fromkeys(said), *self.skipped]


def scale(
    workload: str,
    strategy: str = "ddp",
    ranks: Sequence[int] = (1, 2),
    kind: Kind = "strong",
    *,
    batch_size: int | None = None,
    rounds: int = 8,
    seconds: float = 30.0,
    record: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> Scaling:
    """Time one strategy on several numbers of ranks; strong keeps the global batch, weak the
    batch per rank. The baselines are one process with one thread and, on CPUs, with all cores.
    """
    if kind not in ("strong", "weak"):
        raise ValueError(f"kind is 'strong' or 'weak', not {kind!r}")
    work, here = find_workload(workload), machine()
    size = batch_size or work.batch_size
    cases, skipped = _cases(work, strategy, sorted(set(ranks)), kind, size)
    for name, threads in ((ONE, 1), *(() if here.gpus else ((ALL, here.cores),))):
        cases[name] = Case(inside.Maker("single", work, size), ranks=1, threads=threads, label=name)
    with (
        records.timing_lock(f"{kind} scaling of {strategy}", WAIT_S),
        Ranks(max(c.ranks for c in cases.values()), timeout=max(120, 4 * seconds), echo=False) as r,
    ):
        found = compare(
            cases, ranks=r, rounds=rounds, budget_s=seconds,
            progress=every_fourth(say),
        )  # fmt: skip
    points = tuple(
        _point(name, case, found, here.devices, strategy) for name, case in cases.items()
    )
    result = Scaling(kind, strategy, f"{work.name}, batch {size}", points, tuple(skipped))
    if record:
        told = {"workload": work.name, "strategy": strategy, "kind": kind, "batch_size": size}
        rows = ((name, _values(point)) for name, point in zip(cases, points, strict=True))
        keep.record(record, "scaling", told, found, rows)
    return result


def _cases(
    work: Workload, strategy: str, ranks: Sequence[int], kind: Kind, size: int
) -> tuple[dict[str, Case], list[str]]:
    """The strategy on every number of ranks that fits it, and in words which do not."""
    row, model = strategies.get(strategy), work.make_model(0)
    cases, skipped = {}, []
    for n in ranks:
        batch = size * (n if kind == "weak" else 1)
        against = row.reasons_against(model, n, batch)
        if against:
            skipped.append(f"{strategy} on {n} ranks: {'; '.join(against)}")
            continue
        mesh = dict(zip(row.axes, row.shape(n), strict=True)) if n > 1 else None
        name = f"{strategy} x {n}"
        cases[name] = Case(inside.Maker(strategy, work, batch), ranks=n, mesh=mesh, label=name)
    return cases, skipped


def _point(name: str, case: Case, found: Comparison, devices: int, strategy: str) -> Point:
    ratio = None if name == ONE else found.ratio(name, ONE)
    shown = strategy if name.startswith(f"{strategy} x ") else name
    size = case.make.batch_size if isinstance(case.make, inside.Maker) else 0
    return Point(
        shown, case.ranks, case.threads, size, found[name], ratio, case.ranks > devices
    )  # fmt: skip


def _values(point: Point) -> dict[str, Any]:
    """What is recorded of a point, besides its samples."""
    return {
        "strategy": point.name, "ranks": point.ranks, "threads": point.threads,
        "batch_size": point.batch_size, "oversubscribed": point.oversubscribed,
        "step_s": point.step.median_s, "status": point.step.status, "speedup": point.speedup,
        "warnings": list(point.step.warnings), "taken": point.step.taken,
    }  # fmt: skip
