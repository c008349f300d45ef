"""The results store: begin a run, add its cases one transaction each, read them back, resume."""

from __future__ import annotations

import json
import os
import re
import secrets
import sqlite3
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from ..parameters import Refused
from . import schema, surroundings

DEFAULT = Path("results") / "pardemo.sqlite"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,=+ ()x-]{0,119}")
RUN_COLUMNS = "id, name, status, started, ended, pid, pid_started, machine, parameters, environment"


@dataclass(frozen=True)
class Sample:
    """One sample: rank-maximum seconds per step, where in which round it was taken."""

    round: int
    position: int
    iteration: int
    seconds: float
    phase: str = "measure"


@dataclass(frozen=True)
class RunRow:
    """One run as it was recorded."""

    id: str
    name: str
    status: str
    started: str
    ended: str | None
    pid: int
    pid_started: float
    machine: str
    parameters: dict
    environment: dict

    def __repr__(self) -> str:
        return f"{self.id}  {self.name}  {self.status}  started {self.started}"


@dataclass(frozen=True)
class CaseRow:
    """One finished case: its values, and where its samples are."""

    run: str
    name: str
    repeat: int
    status: str
    ended: str
    values: dict

    def __repr__(self) -> str:
        return f"{self.name} #{self.repeat} of {self.run}: {self.status}"


class Run:
    """A run being written; as a context manager it records how it ended."""

    def __init__(self, store: Store, run_id: str) -> None:
        self.store, self.id = store, run_id

    def add(
        self,
        name: str,
        values: Mapping[str, Any],
        samples: Iterable[Sample] = (),
        repeat: int = 0,
        status: str = "done",
    ) -> None:
        """Write one finished case and its raw samples in one transaction, durable on return."""
        self.store.add_case(self.id, name, values, list(samples), repeat, status)

    def missing(self, names: Iterable[str], repeat: int = 0) -> list[str]:
        """Those of `names` that have no row yet: what a resumed run still has to do."""
        there = {case.name for case in self.store.cases(self.id) if case.repeat == repeat}
        return [name for name in names if name not in there]

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        self.store.end(
            self.id, "interrupted" if stopped else "failed" if kind is not None else "done"
        )

    def __repr__(self) -> str:
        return f"run {self.id} in {self.store.path}"


class Store:
    """One results file. Only the parent process writes to it; ranks send their numbers up.

    A file that may not be written (another user's, a read-only disk) can still be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bad: list[str] = []  # rows whose sha256 does not fit their content
        if path.is_file() and not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
            self.db = schema.connect_to_read(path)
            return
        self.db = schema.connect(path)
        self._mark_lost()

    def close(self) -> None:
        """Close the file; everything acknowledged is already on the disk."""
        self.db.close()

    def begin(self, name: str, parameters: Mapping[str, Any] | None = None) -> Run:
        """Start a run: its environment is taken once, now."""
        run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
        row = [
            run_id, allowed(name), "running", _now(), None, os.getpid(), _started(os.getpid()),
            surroundings.machine_id(), schema.canonical(dict(parameters or {})),
            schema.canonical(surroundings.environment()),
        ]  # fmt: skip
        with schema.transaction(self.db, self.path):
            self.db.execute(
                f"INSERT INTO runs ({RUN_COLUMNS}, sha256) VALUES ({','.join('?' * 11)})",
                [*row, _run_digest(row)],
            )
        return Run(self, run_id)

    def resume(self, name: str, parameters: Mapping[str, Any] | None = None) -> Run | None:
        """The newest unfinished run of the same name and parameters on this machine, if any."""
        wanted = json.loads(schema.canonical(dict(parameters or {})))
        for run in reversed(self.runs()):
            if run.name != name or run.parameters != wanted or run.status == "done":
                continue
            if run.machine != surroundings.machine_id():
                continue
            if run.status == "running" and run.pid != os.getpid():
                raise Refused(f"run {run.id} is still running (process {run.pid})")
            self._update(run.id, "running", None, os.getpid())
            return Run(self, run.id)
        return None

    def add_case(
        self, run: str, name: str, values: Mapping, samples: list[Sample], repeat: int, status: str
    ) -> None:
        """See Run.add; a second row for the same (run, case, repeat) is refused."""
        content, ended = schema.canonical(dict(values)), _now()
        rows = [(s.round, s.position, s.iteration, s.phase, float(s.seconds)) for s in samples]
        check = _case_digest(run, name, repeat, status, ended, content, rows)
        with schema.transaction(self.db, self.path):
            try:
                self.db.execute(
                    "INSERT INTO cases VALUES (?,?,?,?,?,?,?)",
                    [run, allowed(name), repeat, status, ended, content, check],
                )
            except sqlite3.IntegrityError as error:
                raise Refused(f"case {name!r} #{repeat} of run {run}: {error}") from error
            self.db.executemany(
                "INSERT INTO samples VALUES (?,?,?,?,?,?,?,?)",
                [(run, name, repeat, *row) for row in rows],
            )

    def end(self, run: str, status: str) -> None:
        """Record how a run ended: done, failed, interrupted."""
        self._update(run, status, _now(), os.getpid())

    def runs(self) -> list[RunRow]:
        """Every run, oldest first; a row whose sha256 does not fit is left out and named."""
        rows = self._read(f"SELECT {RUN_COLUMNS}, sha256 FROM runs ORDER BY rowid")
        good = []
        for *row, check in rows:
            if _run_digest(row) != check:
                self._doubt(f"run {row[0]}")
            else:
                values = [*row[:8], json.loads(row[8]), json.loads(row[9])]
                good.append(RunRow(**dict(zip(RUN_COLUMNS.split(", "), values, strict=True))))
        return good

    def find(self, wanted: str) -> RunRow:
        """A run by its id, the beginning of its id, or "last", "last-1"..."""
        runs = self.runs()
        if match := re.fullmatch(r"last(?:-(\d+))?", wanted):
            back = int(match[1] or 0) + 1
            if back > len(runs):
                raise Refused(f"{wanted}: there are {len(runs)} runs in {self.path}")
            return runs[-back]
        found = [run for run in runs if run.id.startswith(wanted)]
        if len(found) != 1:
            raise Refused(f"{len(found)} runs begin with {wanted!r}; see `pardemo records`")
        return found[0]

    def cases(self, run: str) -> list[CaseRow]:
        """The finished cases of a run in the order they ended; damaged rows are named, not read."""
        rows = self._read(
            "SELECT run, name, repeat, status, ended, content, sha256 FROM cases"
            " WHERE run = ? ORDER BY rowid",
            [run],
        )
        good = []
        for *row, check in rows:
            timed = [(s.round, s.position, s.iteration, s.phase, s.seconds)
                     for s in self.samples(row[0], row[1], row[2])]  # fmt: skip
            if _case_digest(*row, timed) != check:
                self._doubt(f"case {row[1]!r} #{row[2]} of run {run}")
            else:
                good.append(CaseRow(*row[:5], json.loads(row[5])))  # type: ignore[call-arg]
        return good

    def samples(self, run: str, name: str, repeat: int = 0) -> list[Sample]:
        """The raw samples of a case, warm-up included, in the order they were taken."""
        rows = self._read(
            "SELECT round, position, iteration, seconds, phase FROM samples"
            " WHERE run = ? AND name = ? AND repeat = ? ORDER BY round, iteration, phase DESC",
            [run, name, repeat],
        )
        return [Sample(*row) for row in rows]

    def _read(self, query: str, values: Iterable[Any] = ()) -> list[Any]:
        """All rows; StoreError where damage that passed SQLite's own check is met on the way."""
        try:
            return self.db.execute(query, list(values)).fetchall()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise schema.explain(error, self.path) from error

    def _update(self, run: str, status: str, ended: str | None, pid: int) -> None:
        with schema.transaction(self.db, self.path):
            row = list(
                self.db.execute(f"SELECT {RUN_COLUMNS} FROM runs WHERE id = ?", [run]).fetchone()
            )
            row[2], row[4], row[5], row[6] = status, ended, pid, _started(pid)
            self.db.execute(
                "UPDATE runs SET status=?, ended=?, pid=?, pid_started=?, sha256=? WHERE id=?",
                [row[2], row[4], row[5], row[6], _run_digest(row), run],
            )

    def _mark_lost(self) -> None:
        """A run said to be running by a process that is gone was killed: its cases stay."""
        for run in self.runs():
            mine = run.machine == surroundings.machine_id()
            if run.status == "running" and mine and not _alive(run.pid, run.pid_started):
                self._update(run.id, "lost", None, run.pid)

    def _doubt(self, what: str) -> None:
        if what not in self.bad:
            self.bad.append(what)
            warnings.warn(f"{self.path}: {what} fails its sha256 and is not used", stacklevel=3)


def allowed(name: str) -> str:
    """The name itself when it is made of harmless characters; Refused otherwise."""
    if not NAME.fullmatch(name):
        raise Refused(f"{name!r} is not a name for a record: letters, digits and _.,=+ ()- only")
    return name


def _run_digest(row: Iterable[Any]) -> str:
    return schema.digest(*row)


def _case_digest(*content: Any) -> str:
    *row, timed = content
    return schema.digest(*row, [list(sample) for sample in sorted(timed)])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _alive(pid: int, started: float) -> bool:
    """Whether the process of that start time still runs (its clock may have been corrected)."""
    return abs(_started(pid) - started) < 5


def _started(pid: int) -> float:
    """When a process started (0.0 when it is gone): a pid alone may have been used again."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return 0.0
