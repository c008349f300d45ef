"""same(): did the ranks train exactly as one process would?

Two orders of the same additions differ by rounding, so "same" needs a tolerance. It is relative to
the largest value of each tensor: 1e-4 in float32, 1e-9 in float64, 3e-2 in half precisions. A wrong
algorithm (a sum for a mean, one rank's seed, a missing weight) is off by far more after one step.

A scale below 0.1 in float64 (0.001 otherwise) counts as that. A gradient that is zero but for
rounding (the bias of attention's keys) moves a parameter by lr * 1e-16 / 1e-8 under AdamW, which
is no mistake, and is much beside a bias that began at zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pardemo.check.verdict import NOT_YET, PASSED, Verdict

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
HALF_TOLERANCE = 3e-2
LEAST_SCALE = {torch.float64: 0.1}  # else 1e-3


@dataclass(frozen=True)
class Trace:
    """A run's history: the loss of every step, and the full state after each.

    `notes` are sentences about the run; they are not compared.
    """

    losses: tuple[float, ...]
    states: tuple[dict[str, torch.Tensor], ...]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        losses = " ".join(f"{loss:.4f}" for loss in self.losses)
        return f"{len(self.losses)} steps, loss {losses}"


@dataclass(frozen=True)
class Drift:
    """One tensor of one rank after one step, compared: how far off, in units of its scale."""

    rank: int
    step: int | None
    name: str
    difference: float
    scale: float
    tolerance: float

    @property
    def relative(self) -> float:
        return self.difference / self.scale

    @property
    def over(self) -> bool:
        """Beyond the tolerance; a NaN on one side is."""
        return not self.relative <= self.tolerance

    def __repr__(self) -> str:
        when = "" if self.step is None else f" at step {self.step}"
        return (
            f"rank {self.rank}{when}: {self.name} is off by {self.difference:.1e}, "
            f"{self.relative:.1e} of its scale {self.scale:.1e} (tolerance {self.tolerance:.0e})"
        )


def same(results: Any, reference: Any, tolerance: float | None = None) -> Verdict:
    """Compare what every rank returned with one process; the verdict names who drifted first.

    `results` is one value per rank (as launch returns them), or a single value. A value is a state
    dict, a tensor, a number, a Trace, or a list of these (one per step). `reference` is one such
    value. `tolerance` is relative to each tensor's largest value (default: by dtype).
    """
    try:
        found = [
            drift
            for rank, value in enumerate(_per_rank(results, reference))
            for drift in _compare(rank, None, "", value, reference, tolerance)
        ]
    except _Differs as error:
        return Verdict(NOT_YET, f"not the same thing: {error}")
    if not found:
        return Verdict(NOT_YET, "nothing was compared: no tensors in what was given")
    wrong = [drift for drift in found if drift.over]
    ranks = len({drift.rank for drift in found})
    if not wrong:
        worst = max(found, key=lambda d: d.relative)
        steps = {d.step for d in found if d.step is not None}
        return Verdict(
            PASSED,
            f"{_count(ranks, 'rank')} equal{'' if ranks > 1 else 's'} one process"
            f"{f' after each of {len(steps)} steps' if steps else ''}: "
            f"{len(found)} values compared, largest difference {worst.difference:.1e} "
            f"({worst.name or 'value'}, tolerance {worst.tolerance:.0e} of its scale)",
        )
    return Verdict(NOT_YET, _blame(wrong, ranks))


def _blame(wrong: list[Drift], ranks: int) -> str:
    """First the earliest and worst drift, then who else drifted."""
    first_step = min((d.step or 0) for d in wrong)
    first = max(
        (d for d in wrong if (d.step or 0) == first_step),
        key=lambda d: float("inf") if d.relative != d.relative else d.relative,
    )
    drifted = sorted({d.rank for d in wrong})
    which = (
        "every rank" if len(drifted) == ranks else f"rank {', '.join(map(str, drifted))} of {ranks}"
    )
    names = {d.name for d in wrong if (d.step or 0) == first_step}
    return f"{which} drifted. {first!r}; {_count(len(names), 'tensor')} drifted first"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


class _Differs(Exception):
    """Two values that cannot be compared: other keys, shapes or lengths."""


def _per_rank(results: Any, reference: Any) -> Iterator[Any]:
    """Values by rank; a single value (of the reference's kind) stands for one rank."""
    if isinstance(results, (Trace, Mapping, torch.Tensor, int, float)):
        return iter([results])
    if isinstance(reference, (list, tuple)) and len(results) == len(reference):
        kind = type(reference[0])
        if all(isinstance(value, kind) for value in results) and kind not in (list, tuple):
            return iter([results])  # one rank's steps
    return iter(results)


def _compare(
    rank: int, step: int | None, name: str, value: Any, reference: Any, tolerance: float | None
) -> Iterator[Drift]:
    where = f"rank {rank}{'' if step is None else f', step {step}'}{', ' + name if name else ''}"
    if isinstance(reference, Trace):
        if not isinstance(value, Trace):
            raise _Differs(f"{where} returned {type(value).__name__}, not a Trace")
        states = reference.states[:1]
        exact = max((_tolerance(t, t) for t in states[0].values()), default=0.0) if states else None
        within = exact if tolerance is None else tolerance
        yield from _compare(rank, step, "loss", value.losses, reference.losses, within)
        yield from _compare(rank, step, name, value.states, reference.states, tolerance)
    elif isinstance(reference, Mapping):
        if not isinstance(value, Mapping) or set(value) != set(reference):
            keys = set(value) ^ set(reference) if isinstance(value, Mapping) else {"no state dict"}
            raise _Differs(f"{where}: keys differ: {', '.join(sorted(map(str, keys))[:4])}")
        for key in reference:
            yield from _compare(rank, step, str(key), value[key], reference[key], tolerance)
    elif isinstance(reference, Sequence) and not isinstance(reference, str):
        if len(value) != len(reference):
            raise _Differs(f"{where}: {len(value)} steps, expected {len(reference)}")
        for i, (a, b) in enumerate(zip(value, reference, strict=True)):
            yield from _compare(rank, i, name, a, b, tolerance)
    else:
        yield _drift(rank, step, name, where, value, reference, tolerance)


def _drift(
    rank: int, step: int | None, name: str, where: str, value: Any, reference: Any,
    tolerance: float | None,
) -> Drift:  # fmt: skip
    a, b = torch.as_tensor(value).detach().cpu(), torch.as_tensor(reference).detach().cpu()
    if a.shape != b.shape:
        raise _Differs(f"{where}: shape {tuple(a.shape)}, expected {tuple(b.shape)}")
    if tolerance is None:
        tolerance = _tolerance(a, b)
    least = LEAST_SCALE.get(torch.promote_types(a.dtype, b.dtype), 1e-3)
    a, b = a.double(), b.double()
    difference = (a - b).abs().max().item() if a.numel() else 0.0
    scale = b.abs().max().item() if b.numel() else 1.0
    return Drift(rank, step, name, difference, max(scale, least), tolerance)


def _tolerance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The looser of the two dtypes' tolerances; integers must be equal, floats count as float32."""
    kinds = {t.dtype for t in (a, b)}
    if not any(kind.is_floating_point for kind in kinds):
        return 0.0
    return max(TOLERANCE.get(kind, HALF_TOLERANCE) for kind in kinds if kind.is_floating_point)
