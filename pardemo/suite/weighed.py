"""Memory of every strategy's fullest rank, weighed and by formula, as one table."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass

STATES = ("parameters", "gradients", "optimizer", "buffers")
HEADINGS = ("strategy", *STATES, "activations", "peak", "peak by formula", "reached in")


@dataclass(frozen=True)
class Weighed:
    """One rank: bytes by kind, what the formula says (empty where it says nothing), and when."""

    strategy: str
    memory: Mapping[str, float]
    formula: Mapping[str, float]
    peak_at: str

    @property
    def states_equal(self) -> bool:
        """Whether everything that stays between steps is the formula's, to the byte."""
        return bool(self.formula) and all(
            abs(self.memory[f"{kind}_bytes"] - self.formula[f"{kind}_bytes"]) < 0.5
            for kind in STATES
        )

    @property
    def peak_error(self) -> float | None:
        """Formula over weighed peak, less one."""
        peak = self.formula.get("peak_bytes")
        return None if peak is None else peak / self.memory["peak_bytes"] - 1

    def cells(self) -> list[str]:
        """One text per heading, in MB."""
        error = "" if self.peak_error is None else f" ({self.peak_error:+.0%})"
        peak = self.formula.get("peak_bytes")
        return [
            self.strategy,
            *(self._cell(f"{kind}_bytes") for kind in (*STATES, "activations")),
            f"{self.memory['peak_bytes'] / 1e6:.4g}",
            "" if peak is None else f"{peak / 1e6:.4g}{error}",
            self.peak_at,
        ]

    def _cell(self, kind: str) -> str:
        here, said = self.memory[kind], self.formula.get(kind)
        if said is None or abs(said - here) < 0.5:
            return f"{here / 1e6:.4g}" + ("" if said is None else " =")
        return f"{here / 1e6:.4g} (formula {said / 1e6:.4g})"


@dataclass(frozen=True)
class Scales:
    """The table; `=` marks a number that is the formula's to the byte."""

    rows: tuple[Weighed, ...]

    def __repr__(self) -> str:
        body = [list(HEADINGS), *(row.cells() for row in self.rows)]
        widths = [max(len(cells[i]) for cells in body) for i in range(len(HEADINGS))]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip()
            for cells in body
        )

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{text}</th>" for text in HEADINGS)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row.cells()) + "</tr>"
            for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
