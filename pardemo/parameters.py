"""Parameters of a notebook: their types, and refusing what does not fit with the nearest name.

papermill only warns of an unknown parameter and would then measure the defaults; here a wrong name
or value is refused before anything runs.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
SHOWN = 100  # characters of a wrong value in an error's line
LARGEST = 1e18  # no parameter means more; larger ones overflow further in


class Refused(ValueError):
    """Bad input, said in one line: what was wrong, with which value, what to do."""


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's parameters cell: `name: type = default  # help`."""

    name: str
    type: str
    default: str
    help: str

    def __repr__(self) -> str:
        return f"{self.name}: {self.type} = {self.default}  # {self.help}"

    def value(self, given: Any) -> Any:
        """`given` (a string from the command line, or a YAML value) as this parameter's type."""
        kinds = [kind.strip() for kind in self.type.split("|")]
        if given is None or (isinstance(given, str) and given.lower() in ("none", "null")):
            if "None" in kinds:
                return None
            raise self._misfit(given)
        for kind in (kind for kind in kinds if kind != "None"):
            try:
                return _convert(kind, given)
            except (ValueError, TypeError, SyntaxError, OverflowError, RecursionError, MemoryError):
                continue  # what int(), float() and literal_eval() raise for odd input
        raise self._misfit(given)

    def _misfit(self, given: Any) -> Refused:
        return Refused(
            f"parameter {self.name} takes {self.type} (default {self.default}), not {shown(given)}"
            + (f": {self.help}" if self.help else "")
        )


def folder(text: str) -> Path:
    """The folder that was named on a command line; `--results "$UNSET"` names none."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} names no folder; '.' is the current one")
    return Path(text)


def shown(value: Any) -> str:
    """A wrong value as it may stand in an error's line: its repr, cut short."""
    text = repr(value[:SHOWN]) if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def nearest(wrong: str, known: Iterable[str]) -> str:
    """A sentence that offers the known name nearest to a wrong one, or lists them all."""
    known = sorted(known)
    close = difflib.get_close_matches(str(wrong)[:SHOWN], known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"


def validate(given: Mapping[str, Any], known: Mapping[str, Parameter], where: str) -> dict:
    """The given parameters, converted; Refused for a name or a value that does not fit."""
    for name in given:
        if name not in known:
            raise Refused(f"{where} has no parameter {shown(name)}; {nearest(name, known)}")
    return {name: known[name].value(value) for name, value in given.items()}


def infer(default: str) -> str:
    """The type of a default value's source text, for a line without an annotation."""
    try:
        value = ast.literal_eval(default)
    except (ValueError, SyntaxError):
        return "str"
    if value is None:
        return "str | None"
    if isinstance(value, list | tuple) and value:
        return f"list[{type(value[0]).__name__}]"
    return type(value).__name__


def _convert(kind: str, given: Any) -> Any:
    if kind.startswith(("list", "tuple")):
        return _listed(kind, given)
    if kind == "bool":
        if isinstance(given, str):
            given = WORDS.get(given.strip().lower(), given)
        if not isinstance(given, bool):
            raise ValueError(given)
        return given
    if kind in ("int", "float"):
        if isinstance(given, bool) or (kind == "int" and isinstance(given, float)):
            raise ValueError(given)
        number = int(given) if kind == "int" else float(given)
        if not -LARGEST <= number <= LARGEST:  # not a number is not between them either
            raise ValueError(given)
        return number
    if not isinstance(given, str) or not given.isprintable():
        raise ValueError(given)
    return given


def _listed(kind: str, given: Any) -> list[Any]:
    """`a,b`, `["a", "b"]` or a list, each item converted to the type in the brackets."""
    inner = kind[kind.index("[") + 1 : -1].split(",")[0].strip() if "[" in kind else "str"
    if isinstance(given, str):
        text = given.strip()
        given = ast.literal_eval(text) if text.startswith(("[", "(")) else text.split(",")
    if not isinstance(given, list | tuple):
        given = [given]
    return [_convert(inner, item.strip() if isinstance(item, str) else item) for item in given]
