"""What a prediction is: terms with their formulas, a sum, and an interval.

A number without its formula cannot be argued with, and a number without an interval cannot be
wrong. Every function of this package that predicts returns a `Prediction`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

UNITS = ("s", "bytes", "flops", "")


def human(value: float, unit: str) -> str:
    """Write `value` the way people read it: ms, MB, GFLOP (base 10)."""
    if not math.isfinite(value):
        return f"{value} {unit}".strip()
    scales = {
        "s": [(1.0, "s"), (1e-3, "ms"), (1e-6, "us")],
        "bytes": [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")],
        "flops": [(1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1.0, "FLOP")],
    }.get(unit, [(1.0, unit)])
    if value == 0:
        return f"0 {scales[-1][1]}".strip()
    scale, name = next((pair for pair in scales if abs(value) >= pair[0]), scales[-1])
    return f"{value / scale:.4g} {name}".strip()


@dataclass(frozen=True)
class Term:
    """One addend of a prediction: `name`, the `formula` in words, its `value` and `evidence`.

    `evidence` says where the constants come from ("closed form", "profile a100-dgx 2026-11-23",
    "extrapolated: 4 GB is outside 1 MB - 1 GB").
    """

    name: str
    formula: str
    value: float
    unit: str
    evidence: str = "closed form"

    def __repr__(self) -> str:
        return f"{self.name}: {human(self.value, self.unit)} = {self.formula} [{self.evidence}]"


@dataclass(frozen=True)
class Prediction:
    """A sum of terms with an interval; `float(p)` is the sum, `p["name"]` one term's value."""

    what: str
    terms: tuple[Term, ...]
    unit: str
    lo: float | None = None
    hi: float | None = None
    warnings: tuple[str, ...] = ()
    notes: dict[str, float | str] = field(default_factory=dict, compare=False)

    @property
    def value(self) -> float:
        """The sum of the terms."""
        return float(sum(t.value for t in self.terms))

    @property
    def extrapolated(self) -> bool:
        """True when any term was read outside the range that was calibrated."""
        return any("extrapolated" in t.evidence for t in self.terms)

    def __float__(self) -> float:
        return self.value

    def __iter__(self) -> Iterator[Term]:
        return iter(self.terms)

    def __getitem__(self, name: str) -> float:
        """The value of the terms called `name`; KeyError lists the names there are."""
        found = [t.value for t in self.terms if t.name == name]
        if not found:
            raise KeyError(f"no term {name!r}; there are {[t.name for t in self.terms]}")
        return float(sum(found))

    def ratio(self, measured: float) -> float:
        """Predicted / measured: 1 is right, 2 is twice too slow or too big."""
        if measured <= 0:
            raise ValueError(f"a measured value must be positive, got {measured}")
        return self.value / measured

    def __repr__(self) -> str:
        text = f"{self.what}: {human(self.value, self.unit)}"
        if self.lo is not None and self.hi is not None:
            text += f" ({human(self.lo, self.unit)} to {human(self.hi, self.unit)})"
        if self.extrapolated:
            text += ", extrapolated"
        return text + "".join(f"; {w}" for w in self.warnings)

    def table(self) -> str:
        """Every term on its own line: name, value, share, formula, evidence."""
        total = self.value or 1.0
        name_w = max([len(t.name) for t in self.terms] + [5])
        lines = [repr(self)]
        for t in self.terms:
            share = f"{100 * t.value / total:5.1f} %"
            value = human(t.value, t.unit)
            lines.append(f"  {t.name:<{name_w}} {value:>12} {share}  {t.formula}  [{t.evidence}]")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """A JSON-able copy."""
        return {
            "what": self.what,
            "value": self.value,
            "unit": self.unit,
            "lo": self.lo,
            "hi": self.hi,
            "extrapolated": self.extrapolated,
            "warnings": list(self.warnings),
            "terms": [vars(t) for t in self.terms],
        }
