"""Records: every measurement in one SQLite file, durable, resumable, comparable, exportable.

store = records.open("results/pardemo.sqlite")
with store.begin("strategies", {"workload": "mlp"}) as run:
    run.add("ddp", {"step_s": 0.074}, samples)       # one transaction, durable on return
records.compare(store, store.find("last-1"), store.find("last"))
"""

from __future__ import annotations

from pathlib import Path

from .compare import Cell, Difference, compare, timing
from .export import export
from .lock import Busy, holder
from .lock import timing as timing_lock
from .schema import StoreError
from .store import DEFAULT, CaseRow, Run, RunRow, Sample, Store
from .surroundings import environment

__all__ = [
    "DEFAULT",
    "Busy",
    "CaseRow",
    "Cell",
    "Difference",
    "Run",
    "RunRow",
    "Sample",
    "Store",
    "StoreError",
    "compare",
    "environment",
    "export",
    "holder",
    "open",
    "timing",
    "timing_lock",
]


def open(path: str | Path = DEFAULT) -> Store:
    """Open or create a results file: private to this user, never through a symbolic link."""
    return Store(Path(path))
