"""A machine profile: what calibration measured, as dated JSON that cites its machine.

Schema "pardemo-profile/1" (times in seconds, sizes in bytes, rates per second):

    schema, name, date (YYYY-MM-DD), source        strings; `source` says who measured, or cites
    machine            {"card": text, "devices": int, ...}  any further keys are kept
    per_node           devices in a node
    memory_bytes       of one device
    peak_flops         {"float32": ..., "bfloat16": ...}, and peak_source "measured" | "data sheet"
    memory_bandwidth   bytes/s of one device
    links              {"node": bytes/s per device and direction, "network": the same, 0 if none}
    collectives        [{collective, ranks, nodes, size_bytes, time_s, rounds_s?: [..], gap_s?:
                       computation before it, how?: "soon" after the last one, "beside" computing}]
    compute            [{kind, flops, forward_s, backward_s, rounds_s?: [[f, b], ..]}], kind linear,
                       conv, attention (fused), scores (attention by single operators), norm,
                       embedding, whole (a whole model: forward + backward)
    optimizer          {name, seconds_per_parameter, fixed_s}
    overlap            {hidden_share: 0..1 (0: nothing hides), slowdown: >= 1}
    launch             {step_s, microbatch_s, collective_s; dtensor_s per Linear cut by DTensor,
                       fsdp_s per FSDP unit and fsdp_tensor_s per parameter tensor in one: forward
                       and backward, their collectives silenced}
    constants          {name: value} of constants.TIME, when fitted on runs
    calibrated         {max_nodes, max_ranks, runs}: the largest runs the constants were fitted on
    residual           {median, p90}: how far predictions were from runs, as fractions

Only schema, name, date, source, per_node, memory_bytes and peak_flops must be there; a missing part
makes the predictions that need it refuse, with the name of what to calibrate.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from datetime import date as Date
from importlib import resources
from pathlib import Path
from typing import Any

from pardemo.predict.collectives import Curve, CurveSet
from pardemo.predict.constants import TIME, vector
from pardemo.predict.wire import kind_of

SCHEMA = "pardemo-profile/1"
COMPUTE_KINDS = ("linear", "conv", "attention", "scores", "norm", "embedding", "whole")


class ProfileError(ValueError):
    """A profile file that cannot be used; the message names the file, the field and the fix."""


@dataclass(frozen=True)
class Profile:
    """A calibrated machine. `load` and `save` are its JSON; `.curves()` its collectives."""

    name: str
    date: str
    source: str
    per_node: int
    memory_bytes: float
    peak_flops: dict[str, float]
    machine: dict[str, Any] = field(default_factory=dict)
    peak_source: str = "data sheet"
    memory_bandwidth: float = 0.0
    links: dict[str, float] = field(default_factory=dict)
    collectives: tuple[dict[str, Any], ...] = ()
    compute: tuple[dict[str, Any], ...] = ()
    optimizer: dict[str, Any] = field(default_factory=dict)
    overlap: dict[str, float] = field(default_factory=dict)
    launch: dict[str, float] = field(default_factory=dict)
    constants: dict[str, float] = field(default_factory=dict)
    calibrated: dict[str, float] = field(default_factory=dict)
    residual: dict[str, float] = field(default_factory=dict)
    schema: str = SCHEMA

    def __repr__(self) -> str:
        return (
            f"profile {self.name} of {self.date}: {self.per_node} devices a node, "
            f"{self.memory_bytes / 1e9:.0f} GB each, {len(self.collectives)} collective points, "
            f"{len(self.compute)} compute points ({self.source})"
        )

    @property
    def cite(self) -> str:
        """How a prediction names its evidence."""
        return f"profile {self.name} {self.date}"

    def curves(self, how: str = "") -> CurveSet:
        """One interpolated curve per (collective, ranks, nodes).

        `how`: "soon" or "beside" for the ones that were timed so (see `collectives` above).
        """
        groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
        for row in self.collectives:
            if row.get("how", "") != how:
                continue
            key = (kind_of(row["collective"]), int(row["ranks"]), int(row.get("nodes", 1)))
            groups.setdefault(key, []).append(row)
        return CurveSet(
            Curve(*key, [r["size_bytes"] for r in rows], [r["time_s"] for r in rows])
            for key, rows in groups.items()
        )

    def gap_s(self, how: str = "") -> float:
        """Seconds of computation before each collective that was timed so; 0 where not recorded."""
        gaps = [r["gap_s"] for r in self.collectives if r.get("how", "") == how and "gap_s" in r]
        return sum(gaps) / len(gaps) if gaps else 0.0

    def peak(self, dtype: str = "bfloat16") -> float:
        """Peak FLOP/s of one device in `dtype`; ProfileError when it was not recorded."""
        if dtype not in self.peak_flops:
            raise ProfileError(
                f"{self.name}: no peak for {dtype}; recorded: {sorted(self.peak_flops)}"
            )
        return float(self.peak_flops[dtype])

    def as_dict(self) -> dict[str, Any]:
        """The JSON document."""
        out = asdict(self)
        out["collectives"], out["compute"] = list(self.collectives), list(self.compute)
        return out

    def save(self, path: str | Path) -> Path:
        """Write the JSON; the file is validated first."""
        document = self.as_dict()
        validate(document, str(path))
        Path(path).write_text(json.dumps(document, indent=1) + "\n")
        return Path(path)


REQUIRED: dict[str, Any] = {
    "schema": str,
    "name": str,
    "date": str,
    "source": str,
    "per_node": int,
    "memory_bytes": (int, float),
    "peak_flops": dict,
}
OBJECTS = ("machine", "links", "optimizer", "overlap", "launch", "constants", "calibrated",
           "residual")  # fmt: skip
LISTS = {
    "collectives": ("collective", "ranks", "size_bytes", "time_s"),
    "compute": ("kind", "flops", "forward_s", "backward_s"),
}


def validate(document: object, where: str = "profile") -> dict[str, Any]:
    """Check a JSON document against the schema; ProfileError says what is wrong and where."""
    if not isinstance(document, dict):
        raise ProfileError(f"{where}: a profile is a JSON object, got {type(document).__name__}")
    for key, kind in REQUIRED.items():
        if key not in document:
            raise ProfileError(f"{where}: field {key!r} is missing")
        if not isinstance(document[key], kind) or isinstance(document[key], bool):
            raise ProfileError(
                f"{where}: field {key!r} is of the wrong type: {_shown(document[key])}"
            )
    if document["schema"] != SCHEMA:
        found = _shown(document["schema"])
        raise ProfileError(f"{where}: schema {found}, this version reads {SCHEMA!r}")
    try:
        Date.fromisoformat(document["date"])
    except ValueError:
        raise ProfileError(f"{where}: date {_shown(document['date'])} is not YYYY-MM-DD") from None
    _numbers(document["peak_flops"], f"{where}: peak_flops")
    unknown = set(document) - set(Profile.__dataclass_fields__)
    if unknown:
        raise ProfileError(f"{where}: unknown fields {_shown(sorted(unknown))}")
    _numbers({name: document[name] for name in ("per_node", "memory_bytes")}, where)
    for name in OBJECTS:
        value = document.get(name, {})
        if not isinstance(value, dict):
            raise ProfileError(f"{where}: {name}: an object, got {type(value).__name__}")
        plain = {k: v for k, v in value.items() if k != "name"}
        if name != "machine":
            _numbers(plain, f"{where}: {name}")
    for name, keys in LISTS.items():
        _rows(document.get(name, []), keys, f"{where}: {name}")
    try:
        vector(TIME, document.get("constants", {}))
    except ValueError as error:
        raise ProfileError(f"{where}: constants: {error}") from None
    share = document.get("overlap", {}).get("hidden_share", 0.0)
    if not 0 <= share <= 1:
        raise ProfileError(f"{where}: overlap hidden_share must be 0..1, got {share}")
    return document


def _rows(rows: object, keys: tuple[str, ...], where: str) -> None:
    if not isinstance(rows, list | tuple):
        raise ProfileError(f"{where}: a list of objects, got {type(rows).__name__}")
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ProfileError(f"{where}[{i}]: an object, got {type(row).__name__}")
        missing = [k for k in keys if k not in row]
        if missing:
            raise ProfileError(f"{where}[{i}]: missing {missing}")
        counted = {k: row[k] for k in keys if k not in ("collective", "kind")}
        counted |= {"gap_s": row.get("gap_s", 0)}
        _numbers(counted | {"nodes": row.get("nodes", 1)}, f"{where}[{i}]")
        if "collective" in row:
            try:
                kind_of(str(row["collective"])[:80])
            except ValueError as error:
                raise ProfileError(f"{where}[{i}]: {error}") from None
        if "kind" in row and row["kind"] not in COMPUTE_KINDS:
            raise ProfileError(f"{where}[{i}]: kind {_shown(row['kind'])} is no compute kind")


def _numbers(values: dict[str, Any], where: str) -> None:
    for key, value in values.items():
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not 0 <= value <= sys.float_info.max:  # a number without end is neither
            name = key[:80] if key.isprintable() else _shown(key)
            raise ProfileError(f"{where}: {name} must be a number >= 0, got {_shown(value)}")


def _shown(value: object) -> str:
    """A wrong value as it may stand in an error's line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def load(path_or_name: str | Path | dict[str, Any]) -> Profile:
    """Read a profile from a file, a shipped name ("a100-dgx", "h100-dgx") or a document.

    ProfileError for a file that is missing, is not JSON, or breaks the schema.
    """
    if isinstance(path_or_name, dict):
        document, where = path_or_name, "profile"
    else:
        where = str(path_or_name)
        try:
            text = _text(path_or_name)
            document = json.loads(text)
        except ProfileError:
            raise
        except json.JSONDecodeError as error:
            raise ProfileError(f"{where}: not JSON (line {error.lineno}: {error.msg})") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ProfileError(f"{where}: cannot be read ({error})") from None
        except (RecursionError, ValueError) as error:  # nested, or digits, without end
            raise ProfileError(f"{where}: not JSON ({type(error).__name__})") from None
    checked = dict(validate(document, where))
    checked["collectives"] = tuple(checked.get("collectives", ()))
    checked["compute"] = tuple(checked.get("compute", ()))
    return Profile(**checked)


def _text(path_or_name: str | Path) -> str:
    if str(path_or_name) in shipped():
        folder = resources.files("pardemo.predict") / "profiles"
        return (folder / f"{path_or_name}.json").read_text()
    if not Path(path_or_name).exists():
        raise ProfileError(f"no profile {path_or_name}; shipped: {', '.join(shipped())}")
    return Path(path_or_name).read_text()


def shipped() -> tuple[str, ...]:
    """Names of the profiles that come with the package."""
    folder = resources.files("pardemo.predict") / "profiles"
    return tuple(
        sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json"))
    )
