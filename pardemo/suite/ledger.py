"""Bytes counted beside the closed form, line by line: collective kind, mesh axis, phase."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pardemo.measure import Traffic
from pardemo.measure.traffic import Flow
from pardemo.predict import SentBytes
from pardemo.predict.prediction import human
from pardemo.predict.sent import Message

HEADINGS = ("strategy", "phase", "axis", "collective", "calls", "counted", "by formula", "formula")
PHASES = ("forward", "backward", "optimizer")
Key = tuple[str, str, str]  # phase, axis, kind
SAME = 0.5  # bytes: counts are whole, the formula may divide


@dataclass(frozen=True)
class Entry:
    """One line: what one rank sent of one kind, on one axis, in one phase of one step.

    `formula_bytes` is None where there is no closed form. `note` names how this backend differs
    from the textbook; `textbook_bytes` is what it would have sent without that.
    """

    kind: str
    axis: str
    phase: str
    calls: int
    sent_bytes: float
    formula_bytes: float | None
    formula: str = ""
    note: str = ""
    textbook_bytes: float = 0.0

    @property
    def equal(self) -> bool:
        """Whether the count is the formula, to the byte."""
        return self.formula_bytes is not None and abs(self.formula_bytes - self.sent_bytes) < SAME

    def cells(self) -> list[str]:
        """One text per heading, without the strategy's name."""
        by_formula = "no formula" if self.formula_bytes is None else f"{self.formula_bytes:,.0f}"
        return [
            self.phase, self.axis, self.kind, str(self.calls), f"{self.sent_bytes:,.0f}",
            "equal" if self.equal else by_formula, self.formula,
        ]  # fmt: skip

    def __repr__(self) -> str:
        said = "equal to" if self.equal else "but by formula"
        by_formula = "" if self.formula_bytes is None else (
            f", {said} {human(self.formula_bytes, 'bytes')} = {self.formula}"
        )  # fmt: skip
        return (
            f"{self.phase}: {self.calls} x {self.kind} on {self.axis}, "
            f"{self.sent_bytes:,.0f} bytes{by_formula}"
        )


@dataclass(frozen=True)
class Ledger:
    """All entries of one strategy's rank."""

    strategy: str
    rank: int
    entries: tuple[Entry, ...]

    @property
    def sent_bytes(self) -> float:
        """Counted, over all entries."""
        return sum(entry.sent_bytes for entry in self.entries)

    @property
    def formula_bytes(self) -> float | None:
        """By formula, over all entries; None where there is none."""
        found = [entry.formula_bytes for entry in self.entries]
        return None if None in found else sum(size for size in found if size is not None)

    @property
    def unequal(self) -> list[Entry]:
        """The entries that differ from their formula."""
        return [e for e in self.entries if e.formula_bytes is not None and not e.equal]

    @property
    def notes(self) -> list[str]:
        """Why the bytes are not the textbook's, by name and with both numbers."""
        said: dict[str, list[float]] = {}
        for entry in self.entries:
            if entry.note:
                both = said.setdefault(entry.note, [0.0, 0.0])
                both[0] += entry.sent_bytes
                both[1] += entry.textbook_bytes
        return [
            f"{note} ({sent:,.0f} bytes{'' if sent == usual else f' instead of {usual:,.0f}'})"
            for note, (sent, usual) in said.items()
        ]

    def __repr__(self) -> str:
        head = f"{self.strategy}, rank {self.rank}: {self.sent_bytes:,.0f} bytes per step"
        return "\n  ".join([head, *map(repr, self.entries)])


@dataclass(frozen=True)
class Book:
    """The ledgers of several strategies as one table, for people."""

    ledgers: tuple[Ledger, ...]

    def lines(self) -> list[list[str]]:
        """One list of cells per entry, in the order of the headings."""
        return [
            [ledger.strategy if i == 0 else "", *entry.cells()]
            for ledger in self.ledgers for i, entry in enumerate(ledger.entries)
        ]  # fmt: skip

    def __repr__(self) -> str:
        rows = [list(HEADINGS), *self.lines()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{text}</th>" for text in HEADINGS)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.lines()
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def compare(
    strategy: str, traffic: Traffic, formula: SentBytes | None, axes: Mapping[str, int]
) -> Ledger:
    """Set one rank's count beside its closed form.

    `axes` are the mesh's axes and degrees: a group of all ranks is called "world" by torch, and by
    the name of the only axis here when there is only one.
    """
    used = [axis for axis, size in axes.items() if size > 1]
    whole = used[0] if len(used) == 1 else "world"
    flows: dict[Key, list[Flow]] = {}
    for flow in traffic.flows:
        if flow.sent_bytes:
            group = whole if flow.group == "world" else flow.group
            flows.setdefault((flow.phase, group, flow.kind), []).append(flow)
    messages: dict[Key, list[Message]] = {}
    for m in formula.messages if formula is not None else ():
        if not m.sent_bytes:
            continue  # it only receives
        messages.setdefault((m.phase, m.axis, m.kind), []).append(m)
    keys = sorted(flows.keys() | messages.keys(), key=lambda k: (PHASES.index(k[0]), k))
    entries = [
        _entry(key, flows.get(key, []), messages.get(key, []), formula is not None) for key in keys
    ]
    return Ledger(strategy, traffic.rank, tuple(entries))


def _entry(key: Key, flows: Sequence[Flow], messages: Sequence[Message], known: bool) -> Entry:
    phase, axis, kind = key
    return Entry(
        kind,
        axis,
        phase,
        calls=sum(flow.calls for flow in flows),
        sent_bytes=sum(flow.sent_bytes for flow in flows),
        formula_bytes=float(sum(m.sent_bytes for m in messages)) if known else None,
        formula=" + ".join(dict.fromkeys(m.formula for m in messages)),
        note="; ".join(dict.fromkeys(flow.note for flow in flows if flow.note)),
        textbook_bytes=sum(flow.textbook_bytes for flow in flows),
    )
