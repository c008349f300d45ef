"""What the suite found: one row per strategy, as text, HTML, figures and records."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pardemo.measure import Ratio, Timing

from .ledger import Book, Ledger
from .weighed import STATES, Scales, Weighed

ONE, ALL = "single", "single on all cores"  # the two baselines
HEADINGS = (
    "strategy", "ranks x threads", "step [ms]", "95 % interval", "predicted", "error",
    "vs one thread", "vs all cores", "sent [MB]", "formula", "exposed", "idle", "memory [MB]",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One strategy on one workload. `reason` says why it was not timed; else `step` is there.

    Bytes and memory are those of the rank that has most of them. Parts of the step (compute_s,
    exposed_s, overlapped_s, idle_s, rest_s) are None where they were not decomposed.
    """

    name: str
    title: str
    ranks: int
    threads: int
    reason: str = ""
    equal: str = ""
    step: Timing | None = None
    batch_size: int = 1
    predicted_s: float | None = None
    predicted_lo_s: float | None = None
    predicted_hi_s: float | None = None
    sent_bytes: float | None = None
    formula_bytes: float | None = None
    formula: str = ""
    traffic_notes: tuple[str, ...] = ()
    compute_s: float | None = None
    exposed_s: float | None = None
    overlapped_s: float | None = None
    idle_s: float | None = None
    rest_s: float | None = None
    ledger: Ledger | None = None
    equal_ranks: int = 0
    memory: Mapping[str, float] = field(default_factory=dict)
    memory_formula: Mapping[str, float] = field(default_factory=dict)
    peak_at: str = ""
    vs_one: Ratio | None = None
    vs_all: Ratio | None = None

    @property
    def step_s(self) -> float | None:
        """Median seconds per optimiser step."""
        return None if self.step is None else self.step.median_s

    @property
    def status(self) -> str:
        """How far the time can be trusted: ok, noisy, contaminated, oversubscribed."""
        return "not timed" if self.step is None else self.step.status

    @property
    def throughput(self) -> float | None:
        """Samples per second: the batch over the median time."""
        return None if self.step is None else self.batch_size / self.step.median_s

    @property
    def throughput_lo(self) -> float | None:
        """The lower end, from the upper end of the time's interval."""
        return self._rate(self.step.hi_s if self.step else None)

    @property
    def throughput_hi(self) -> float | None:
        """The upper end, from the lower end of the time's interval."""
        return self._rate(self.step.lo_s if self.step else None)

    @property
    def throughput_predicted(self) -> float | None:
        """What was predicted."""
        return self._rate(self.predicted_s)

    @property
    def error(self) -> float | None:
        """Predicted over measured, less one."""
        if self.step is None or self.predicted_s is None:
            return None
        return self.predicted_s / self.step.median_s - 1

    @property
    def sent_as_formula(self) -> bool:
        """Whether every rank sent what the closed form says, in every kind, axis and phase."""
        if self.ledger is not None:
            return self.ledger.formula_bytes is not None and self.equal_ranks == self.ranks
        both = (self.formula_bytes, self.sent_bytes)
        return None not in both and abs((both[0] or 0) - (both[1] or 0)) < 0.5

    @property
    def memory_bytes(self) -> float | None:
        """Everything one rank keeps at the peak of a step."""
        return self.memory.get("peak_bytes") if self.memory else None

    def _rate(self, seconds: float | None) -> float | None:
        usable = seconds is not None and math.isfinite(seconds) and seconds > 0
        return self.batch_size / seconds if usable and seconds else None

    def cells(self) -> list[str]:
        """The row as the table prints it, one text per heading."""
        assert self.step is not None
        sure = f"{self.step.lo_s * 1e3:.3g}-{self.step.hi_s * 1e3:.3g}"
        flag = "" if self.status == "ok" else f" {self.status.upper()}"
        return [
            self.name,
            f"{self.ranks} x {self.threads}",
            f"{self.step.median_s * 1e3:.3g}{flag}",
            sure if math.isfinite(self.step.hi_s) else "none",
            "" if self.predicted_s is None else f"{self.predicted_s * 1e3:.3g}",
            "" if self.error is None else f"{self.error:+.0%}",
            _speedup(self.vs_one),
            _speedup(self.vs_all),
            _mega(self.sent_bytes),
            self._formula_cell(),
            "" if self.exposed_s is None else f"{self.exposed_s / self.step.median_s:.0%}",
            "" if self.idle_s is None else f"{self.idle_s / self.step.median_s:.0%}",
            _mega(self.memory_bytes),
        ]

    def _formula_cell(self) -> str:
        if self.formula_bytes is None or self.sent_bytes is None:
            return ""
        if self.sent_as_formula:
            return "equal"
        return _mega(self.formula_bytes)

    def values(self) -> dict[str, Any]:
        """Everything but raw samples, as JSON-able values for the records."""
        plain = {
            name: getattr(self, name)
            for name in (
                "title", "ranks", "threads", "reason", "equal", "batch_size", "step_s", "status",
                "throughput", "predicted_s", "predicted_lo_s", "predicted_hi_s", "error",
                "sent_bytes", "formula_bytes", "formula", "compute_s", "exposed_s",
                "overlapped_s", "idle_s", "rest_s", "equal_ranks", "peak_at",
            )
        }  # fmt: skip
        plain["memory"] = dict(self.memory)
        plain["memory_formula"] = dict(self.memory_formula)
        plain["ledger"] = [] if self.ledger is None else [
            dataclasses.asdict(entry) for entry in self.ledger.entries
        ]  # fmt: skip
        plain["traffic_notes"] = list(self.traffic_notes)
        if self.step is not None:
            plain |= {"lo_s": self.step.lo_s, "hi_s": self.step.hi_s}
            plain |= {"rounds": self.step.rounds, "warnings": list(self.step.warnings)}
            plain |= {"taken": self.step.taken}
        for name in ("vs_one", "vs_all"):
            ratio = getattr(self, name)
            plain[name] = None if ratio is None else repr(ratio)
        return plain


@dataclass(frozen=True)
class Table:
    """Every strategy on one workload and batch; prints as a table, feeds the figures."""

    workload: str
    batch_size: int
    rows: tuple[Row, ...]
    card: str
    stopped: str = ""
    notes: tuple[str, ...] = ()
    run_id: str = ""

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; there are {', '.join(row.name for row in self.rows)}")

    @property
    def timed(self) -> list[Row]:
        """The rows that have a time."""
        return [row for row in self.rows if row.step is not None]

    def untimed(self) -> dict[str, list[str]]:
        """Names of the strategies that were not timed, by the reason."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            if row.step is None:
                found.setdefault(row.reason, []).append(row.name)
        return found

    def samples(self) -> dict[str, list[float]]:
        """Every measured step in seconds, by name: for plot.dots."""
        return {
            row.name: [s for round_ in row.step.samples for s in round_]
            for row in self.timed
            if row.step is not None
        }

    def predictions(self) -> dict[str, float]:
        """Predicted seconds by name, where there is a prediction."""
        return {row.name: row.predicted_s for row in self.timed if row.predicted_s is not None}

    def counted(self) -> dict[str, float]:
        """Bytes sent per rank and step by name, counted: for plot.bytes."""
        return {row.name: row.sent_bytes for row in self.rows if row.sent_bytes}

    def formula(self) -> dict[str, float]:
        """The same by the closed form."""
        return {
            row.name: row.formula_bytes for row in self.rows
            if row.sent_bytes and row.formula_bytes is not None
        }  # fmt: skip

    def memory(self) -> dict[str, Mapping[str, float]]:
        """Memory of the fullest rank by name: for plot.memory."""
        return {row.name: row.memory for row in self.rows if row.memory}

    def memory_formula(self) -> dict[str, float]:
        """Parameters, gradients, optimizer state and buffers by formula, for plot.memory."""
        return {
            row.name: sum(row.memory_formula[f"{kind}_bytes"] for kind in STATES)
            for row in self.rows if row.memory and row.memory_formula
        }  # fmt: skip

    def book(self) -> Book:
        """Bytes line by line: collective kind, mesh axis and phase, counted and by formula."""
        return Book(tuple(row.ledger for row in self.rows if row.ledger and row.ledger.entries))

    def scales(self) -> Scales:
        """Memory of the fullest rank, kind by kind, weighed and by formula."""
        return Scales(tuple(
            Weighed(row.name, row.memory, row.memory_formula, row.peak_at)
            for row in self.rows if row.memory
        ))  # fmt: skip

    def frame(self) -> Any:
        """A pandas DataFrame with one row per strategy and a column per value."""
        import pandas as pd

        return pd.DataFrame([{"name": row.name} | row.values() for row in self.rows])

    def __repr__(self) -> str:
        body = [row.cells() for row in self.timed]
        keep = [i for i in range(len(HEADINGS)) if any(cells[i] for cells in body)] or [0]
        widths = [max(len(cells[i]) for cells in [list(HEADINGS), *body]) for i in keep]
        lines = [f"{self.workload}, {self.batch_size} samples per step"]
        for cells in [list(HEADINGS), *body]:
            line = "  ".join(cells[i].ljust(w) for i, w in zip(keep, widths, strict=True))
            lines.append(line.rstrip())
        lines += [f"not timed: {', '.join(names)}: {why}" for why, names in self.untimed().items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(text)}</th>" for text in HEADINGS)
        body = ""
        for row in self.timed:
            body += "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row.cells())
            body += "</tr>"
        for why, names in self.untimed().items():
            text = html.escape(f"not timed: {', '.join(names)}: {why}")
            body += f'<tr><td colspan="{len(HEADINGS)}">{text}</td></tr>'
        said = html.escape(f"{self.workload}, {self.batch_size} samples per step")
        return f"<p>{said}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _speedup(ratio: Ratio | None) -> str:
    """The speed-up with its interval, or that it was refused (the doubts say why)."""
    if ratio is None:
        return ""
    if ratio.refused:
        return "refused"
    return f"{1 / ratio.value:.2f}x ({1 / ratio.hi:.2f}-{1 / ratio.lo:.2f})"


def _mega(size: float | None) -> str:
    return "" if size is None else f"{size / 1e6:.4g}"
