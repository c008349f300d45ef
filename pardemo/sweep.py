"""Sweeps: a small YAML file that says which benchmark to run with which values, validated first.

benchmark: scaling            # a notebook of benchmarks/
parameters: {workload: mlp}   # the same in every case
grid: {nprocs: [1, 2, 4]}     # every combination is one case
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from . import notebooks
from .parameters import Parameter, Refused, nearest, shown, validate

KEYS = ("benchmark", "parameters", "grid")
MOST_CASES = 500
LARGEST = 100_000  # characters of a sweep file
DEEPEST = 10  # lists in lists
LONGEST = 110  # characters of a case's name


@dataclass(frozen=True)
class Case:
    """One notebook run: a benchmark and the parameters it is given."""

    benchmark: str
    given: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """The same case always has the same name: it is how an interrupted sweep resumes."""
        told = " ".join(f"{key}={_short(value)}" for key, value in self.given)
        whole = f"{self.benchmark} {told}".strip()
        return whole if len(whole) <= LONGEST else f"{whole[: LONGEST - 7]}-{_digest(whole)}"

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Sweep:
    """A validated sweep: cases in the order in which they run."""

    source: str
    cases: tuple[Case, ...]

    @property
    def config(self) -> dict[str, Any]:
        """What makes two sweeps the same: their cases."""
        return {"cases": [case.name for case in self.cases]}


def load(path: Path) -> Sweep:
    """Read and check a sweep file; Refused says what is wrong before anything runs."""
    document = _document(path)
    if not isinstance(document, Mapping):
        raise Refused(f"{path} must be a mapping with benchmark, parameters and grid")
    for key in document:
        if key not in KEYS:
            raise Refused(f"{path}: unknown key {shown(key)}; {nearest(str(key), KEYS)}")
    if not isinstance(document.get("benchmark"), str):
        raise Refused(f"{path}: benchmark must name one of {', '.join(benchmarks())}")
    fixed, grid = document.get("parameters") or {}, document.get("grid") or {}
    if not isinstance(fixed, Mapping) or not isinstance(grid, Mapping):
        raise Refused(f"{path}: parameters and grid must be mappings of names to values")
    return Sweep(str(path), tuple(_cases(document["benchmark"], fixed, grid, path)))


def _document(path: Path) -> Any:
    """What the file says; Refused for what is not plain, short YAML."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise Refused(f"{path} is longer than {LARGEST:,} characters: that is no sweep")
        depth = 0
        for event in yaml.parse(text):  # as it is read: deep nesting takes long to read to the end
            if isinstance(event, yaml.AliasEvent):
                raise Refused(f"{path} has an alias (*name): write out what it stands for")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise Refused(f"{path} is nested more than {DEEPEST} deep: that is no sweep")
        return yaml.safe_load(text)
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror}") from error
    except Refused:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2020-99-99
        said = " ".join(str(error).split())[:300]
        raise Refused(f"{path} is not a YAML file of plain values: {said}") from error


def benchmarks() -> list[str]:
    """The benchmarks there are."""
    return list(notebooks.known("benchmarks"))


def checked(benchmark: str, given: Mapping[str, Any]) -> Case:
    """A case whose benchmark exists and whose parameters fit; Refused otherwise."""
    path = notebooks.find(benchmark, "benchmarks")
    known = notebooks.parameters(path)
    values = validate(given, known, path.name)
    for name, value in values.items():
        _sensible(known[name], value)
    return Case(path.stem, tuple(values.items()))


def _sensible(parameter: Parameter, value: Any) -> None:
    """Refuse an impossible number, as the notebook would, before its kernel starts.

    No number of a benchmark is negative; a whole one that is positive by default counts something.
    """
    if isinstance(value, int | float):
        counts = isinstance(value, int) and parameter.default.isdecimal()
        least = min(1, int(parameter.default)) if counts else 0
        if value < least:
            raise Refused(
                f"parameter {parameter.name} must be at least {least}, not {value}: "
                f"{parameter.help}"
            )


def _cases(
    benchmark: str, fixed: Mapping[str, Any], grid: Mapping[str, Any], path: Path
) -> list[Case]:
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise Refused(
                f"{path}: grid {shown(name)} must be a list of values, not {shown(values)}"
            )
        if name in fixed:
            raise Refused(f"{path}: {shown(name)} is both a parameter and on the grid")
    count = math.prod(map(len, grid.values()))
    if count > MOST_CASES:
        raise Refused(f"{path}: {count:,} cases; at most {MOST_CASES} in one sweep")
    combinations = itertools.product(*grid.values())
    cases = [
        checked(benchmark, {**fixed, **dict(zip(grid, values, strict=True))})
        for values in combinations
    ]
    if len({case.name for case in cases}) < len(cases):
        raise Refused(f"{path}: the grid holds the same case twice")
    return cases


def _short(value: Any) -> str:
    """A value as it may stand in a record's name; a long one by its digest."""
    text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    plain = "".join(c if c.isalnum() or c in "_.,=+-" else "-" for c in text)
    if len(plain) > 30 or plain != text:
        plain = f"{plain[:20]}-{_digest(text)}"
    return plain


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
