"""Checks: equal to one process, and verdicts for the lessons' exercises.

`check.same(results, reference)`, `check.strategy("ddp", "mlp")`, `check.lesson04.buckets(answer)`.
"""

from __future__ import annotations

import importlib
import re
from types import ModuleType

from pardemo.check.same import Trace, same
from pardemo.check.strategy import strategy
from pardemo.check.verdict import NotYet, Verdict, demand, is_stub, verdict

__all__ = ["NotYet", "Trace", "Verdict", "demand", "is_stub", "same", "strategy", "verdict"]


def __getattr__(name: str) -> ModuleType:
    if re.fullmatch(r"lesson\d\d", name):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
