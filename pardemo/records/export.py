"""Export records for other tools: JSON Lines, CSV, and Parquet where pyarrow is there."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from ..parameters import Refused
from .store import Store

FORMATS = ("jsonl", "csv", "parquet")


def cells(store: Store, run: str | None = None) -> list[dict[str, Any]]:
    """One flat row per finished case: run, name, repeat, status and every plain value."""
    rows = []
    for row in store.runs():
        if run is not None and row.id != run:
            continue
        for case in store.cases(row.id):
            head = {"run": row.id, "benchmark": row.name, "case": case.name}
            rows.append(head | {"repeat": case.repeat, "outcome": case.status} | case.values)
    return rows


def samples(store: Store, run: str | None = None) -> list[dict[str, Any]]:
    """One row per raw sample of every case."""
    rows = []
    for row in store.runs():
        if run is not None and row.id != run:
            continue
        for case in store.cases(row.id):
            for sample in store.samples(row.id, case.name, case.repeat):
                head = {"run": row.id, "case": case.name, "repeat": case.repeat}
                rows.append(head | vars(sample))
    return rows


def export(store: Store, target: Path, run: str | None = None, raw: bool = False) -> int:
    """Write cases (or raw samples) to `target`; its suffix says the format. Returns the rows.

    A target is replaced as a whole or not at all, and is private to this user.
    """
    kind = target.suffix.lstrip(".")
    if kind not in FORMATS:
        raise Refused(f"{target} ends in none of {', '.join('.' + name for name in FORMATS)}")
    if target.is_symlink():
        raise Refused(f"{target} is a symbolic link; name a real file")
    rows = samples(store, run) if raw else cells(store, run)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        {"jsonl": _jsonl, "csv": _csv, "parquet": _parquet}[kind](part, rows)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return len(rows)


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, sort_keys=False) + "\n" for row in rows)


def _csv(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns)
        writer.writeheader()
        writer.writerows(
            {key: value if _plain(value) else json.dumps(value) for key, value in row.items()}
            for row in rows
        )


def _parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise Refused("Parquet needs pyarrow (pip install pyarrow); .csv and .jsonl need nothing")
    import pandas

    flat = [{k: v if _plain(v) else json.dumps(v) for k, v in row.items()} for row in rows]
    pandas.DataFrame(flat).to_parquet(path)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)
