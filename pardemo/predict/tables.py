"""Read a CSV of published runs and recognise what kind of table it is by its columns.

Kinds: "iterations" (tensor/data/pipeline parallelism and iter_ms), "layouts" (dp, pp, tp, zero,
status), "training" (papers' tables: iter_s or tok_s_gpu), "collectives" (size and time or
bandwidth) and "ddp" (DP and DDP against one GPU). A bad file gives one `TableError` that names the
line and the column.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


class TableError(ValueError):
    """A table that cannot be used; the message is one line: file, line, column, what to do."""


# kind -> (columns that must be there, groups of which one must be there)
KINDS: dict[str, tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]] = {
    "iterations": (
        (
            "micro_batch",
            "hidden_size",
            "attention_heads",
            "n_layers",
            "sequence_length",
            "tensor_parallelism",
            "data_parallelism",
            "pipeline_parallelism",
            "iter_ms",
        ),
        (("global_batch",),),
    ),
    "layouts": (
        ("layers", "hidden", "heads", "ffn", "vocab", "seq", "mbs", "dp", "pp", "tp", "zero"),
        (("step_s", "tok_s_gpu", "tok_s"), ("grad_acc", "gbs"), ("status",)),
    ),
    "training": (
        ("n_heads", "hidden", "layers", "seq", "vocab", "tp", "dp", "mbs", "gpus"),
        (("iter_s", "tok_s_gpu"),),
    ),
    "collectives": (
        ("collective", "ranks", "nodes", "size_bytes"),
        (("time_us", "algbw_GBps", "busbw_GBps", "busbw_GBps_mid"),),
    ),
    "ddp": (("model", "config", "gpus", "strategy"), (("iter_s_p50", "ex_s_per_gpu", "steps_s"),)),
}
RATES = ("algbw_GBps", "busbw_GBps", "busbw_GBps_mid", "inter_Gbps_cfg")
LARGEST = 1e24  # of any number in a table: bytes, FLOP/s and tokens stay far below
DELIMITERS = ",;\t"
MISSING = ("", "nan", "none", "null", "na", "n/a", "-")


@dataclass(frozen=True)
class Table:
    """A recognised table: text cells by column; `lines[i]` is row i's line in the file."""

    path: str
    kind: str
    cells: dict[str, list[str]]
    lines: list[int]

    def __len__(self) -> int:
        return len(self.lines)

    def __repr__(self) -> str:
        return f"{Path(self.path).name}: {len(self)} rows, a table of {self.kind}"

    def has(self, column: str) -> bool:
        """Is there such a column?"""
        return column in self.cells

    def text(self, column: str, default: str = "") -> list[str]:
        """A column as text; `default` everywhere when it is absent."""
        return self.cells.get(column, [default] * len(self))

    def numbers(self, column: str, default: float = math.nan) -> np.ndarray:
        """A column as floats, nan where empty; TableError names a cell that is not a number."""
        if column not in self.cells:
            return np.full(len(self), default)
        out = np.full(len(self), math.nan)
        for i, cell in enumerate(self.cells[column]):
            if cell.strip().lower() in MISSING:
                continue
            try:
                out[i] = float(cell)
            except ValueError:
                where = f"{self.path}: line {self.lines[i]}, column {column!r}"
                raise TableError(f"{where}: {cell[:40]!r} is not a number") from None
            if abs(out[i]) > LARGEST:
                where = f"{self.path}: line {self.lines[i]}, column {column!r}"
                raise TableError(f"{where}: {cell[:40]!r} is beyond any size, time or rate")
        return np.where(np.isnan(out) & ~math.isnan(default), default, out)


def read(path: str | Path) -> Table:
    """Read and recognise a table, its cells parted by commas, semicolons or tabs.

    Columns may be written in capitals.
    TableError for a file that is missing, binary, empty, ragged.
    """
    name = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise TableError(f"{name}: not a text file (expected CSV in UTF-8)") from None
    except OSError as error:
        raise TableError(f"{name}: cannot be read ({error.strerror})") from None
    if "\x00" in text:
        raise TableError(f"{name}: not a text file (it has NUL bytes)")
    lines = text.splitlines()
    first = next((line for line in lines if line.strip()), "")
    reader = csv.reader(lines, delimiter=max(DELIMITERS, key=first.count))  # of equals, the first
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise TableError(f"{name}: line {reader.line_num}: {error}") from None
    if len(rows) < 2:
        raise TableError(f"{name}: no rows: expected a header line and at least one row")
    header = [_column(h.strip()) for h in rows[0][1]]
    twice = sorted({h for h in header if header.count(h) > 1})
    if twice:
        raise TableError(f"{name}: line 1: columns named twice: {', '.join(twice)}")
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise TableError(f"{name}: line {line}: {len(row)} cells, the header has {len(header)}")
    cells = {h: [row[i] for _, row in rows[1:]] for i, h in enumerate(header)}
    return Table(name, recognise(name, header), cells, [line for line, _ in rows[1:]])


def _column(written: str) -> str:
    """The column's name whatever its capitals; but in a rate they tell Gb from GB."""
    small = written.lower()
    if "gbps" not in small:
        return small
    return next((r for r in RATES if written.isupper() and r.lower() == small), written)


def recognise(name: str, header: Sequence[str]) -> str:
    """The kind whose columns are all there; TableError says what the nearest kind lacks."""
    best: tuple[int, str, list[str]] | None = None
    for kind, (needed, groups) in KINDS.items():
        lacks = [c for c in needed if c not in header]
        lacks += ["|".join(g) for g in groups if not any(c in header for c in g)]
        if not lacks:
            return kind
        share = len(lacks)
        if best is None or share < best[0]:
            best = (share, kind, lacks)
    assert best is not None
    raise TableError(
        f"{name}: not a table this command knows; nearest is {best[1]!r}, which lacks the columns "
        f"{', '.join(best[2])}"
    )
