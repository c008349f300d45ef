"""The results file: SQLite with three tables, opened so that nothing acknowledged is ever lost.

runs     one row per run: name, parameters, environment (once), status, process that made it
cases    one row per finished case: PRIMARY KEY (run, name, repeat), its values as JSON
samples  raw times of a case, one row per sample: round, position in the round, iteration, phase

`PRAGMA user_version` is the schema's version. Each row of runs and cases carries a sha256 of its
own content (a case's covers its samples), because SQLite does not notice flipped payload bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import sqlite3
import stat
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from ..parameters import Refused

VERSION = 1
APPLICATION = 0x70617264  # "pard" in the file's header: this is pardemo's file
LOCAL_DISKS = {
    "bcachefs",
    "btrfs",
    "ext2",
    "ext3",
    "ext4",
    "f2fs",
    "overlay",
    "tmpfs",
    "xfs",
    "zfs",
}
DAMAGE = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
# of a path that can never hold records, whoever asks
NO_FILE = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO)
TABLES = """
CREATE TABLE runs (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, status TEXT NOT NULL, started TEXT NOT NULL,
    ended TEXT, pid INTEGER NOT NULL, pid_started REAL NOT NULL, machine TEXT NOT NULL,
    parameters TEXT NOT NULL, environment TEXT NOT NULL, sha256 TEXT NOT NULL
) STRICT;
CREATE TABLE cases (
    run TEXT NOT NULL REFERENCES runs(id), name TEXT NOT NULL, repeat INTEGER NOT NULL,
    status TEXT NOT NULL, ended TEXT NOT NULL, content TEXT NOT NULL, sha256 TEXT NOT NULL,
    PRIMARY KEY (run, name, repeat)
) STRICT;
CREATE TABLE samples (
    run TEXT NOT NULL, name TEXT NOT NULL, repeat INTEGER NOT NULL, round INTEGER NOT NULL,
    position INTEGER NOT NULL, iteration INTEGER NOT NULL, phase TEXT NOT NULL,
    seconds REAL NOT NULL,
    PRIMARY KEY (run, name, repeat, round, iteration, phase),
    FOREIGN KEY (run, name, repeat) REFERENCES cases(run, name, repeat)
) STRICT, WITHOUT ROWID;
"""


class StoreError(RuntimeError):
    """The results file cannot be used; the message names it and says what to do."""


def connect(path: Path) -> sqlite3.Connection:
    """Open (or create, private to this user) the results file; set a damaged one aside."""
    _make_private(path)
    try:
        return _open(path)
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter: SQLite quotes damage
        named = getattr(error, "sqlite_errorname", "").split("_IOERR")[0]
        if isinstance(error, sqlite3.DatabaseError) and named not in DAMAGE:
            raise explain(error, path) from error
        aside = set_aside(path)
        warnings.warn(f"{path} is damaged ({error}); set aside as {aside.name}", stacklevel=3)
        _make_private(path)
        return _open(path)


def connect_to_read(path: Path) -> sqlite3.Connection:
    """Open a results file that may not be written, as it lies there; StoreError where it cannot be.

    Beside a journal that still holds rows, SQLite needs a folder it may write to.
    """
    journal = path.with_name(path.name + "-wal")
    ways = ["mode=ro"]
    if not (journal.exists() and journal.stat().st_size):
        ways.append("mode=ro&immutable=1")
    failed: Exception | None = None
    for way in ways:
        db = sqlite3.connect(f"{path.resolve().as_uri()}?{way}", uri=True, isolation_level=None)
        db.text_factory = _text
        try:
            _check(db, path)
            return db
        except BaseException as error:
            db.close()
            if not isinstance(error, sqlite3.DatabaseError | UnicodeDecodeError):
                raise
            failed = error
    raise StoreError(f"{path} cannot be read: {failed}; copy it to a folder of yours and try again")


def set_aside(path: Path) -> Path:
    """Rename a damaged file and its journals; nothing is ever deleted."""
    stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"
    aside = path.with_name(f"{path.name}.damaged-{stamp}")
    for suffix in ("-wal", "-shm", "-journal", ""):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(aside.with_name(aside.name + suffix))
    return aside


@contextlib.contextmanager
def transaction(db: sqlite3.Connection, path: Path) -> Iterator[None]:
    """One atomic write: all of it is on the disk when this returns, or nothing is."""
    try:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("COMMIT")
    except (sqlite3.Error, UnicodeDecodeError) as error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise explain(error, path) from error
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def explain(error: sqlite3.Error | UnicodeDecodeError, path: Path) -> StoreError:
    """The same failure in words that say which file and what to do."""
    name = getattr(error, "sqlite_errorname", "")
    if name == "SQLITE_FULL" or "IOERR_WRITE" in name:
        free = psutil.disk_usage(str(path.parent)).free
        return StoreError(
            f"the disk is full: {path} could not grow ({free / 1e6:.1f} MB free there); "
            "earlier records are safe, free some space and run again to resume"
        )
    if name in ("SQLITE_READONLY", "SQLITE_CANTOPEN") or "READONLY" in name:
        return StoreError(f"{path} cannot be written: {error}; check its permissions")
    if name in ("SQLITE_BUSY", "SQLITE_LOCKED"):
        return StoreError(f"{path} is locked by another process for over 30 s; try again later")
    if name in DAMAGE or isinstance(error, UnicodeDecodeError):
        return StoreError(f"{path} is damaged: {error}; rename it, and the next run begins another")
    return StoreError(f"{path}: {error}")


def digest(*content: Any) -> str:
    """sha256 of a row's content in one canonical form."""
    return hashlib.sha256(canonical(content).encode()).hexdigest()


def canonical(value: Any) -> str:
    """JSON with sorted keys; the same value always gives the same text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def journal_mode(folder: Path) -> str:
    """WAL where the file system is a known local one; else DELETE: WAL needs shared memory."""
    best, kind = "", ""
    for part in psutil.disk_partitions(all=True):
        inside = folder.is_relative_to(part.mountpoint)
        if inside and len(part.mountpoint) >= len(best):
            best, kind = part.mountpoint, part.fstype
    return "WAL" if kind in LOCAL_DISKS else "DELETE"


def _make_private(path: Path) -> None:
    """An empty file of mode 0600 in a folder of mode 0700; a symbolic link is refused."""
    for place in (path, path.parent):
        if place.is_symlink():
            raise Refused(f"{place} is a symbolic link; records are only written to a real file")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(path, flags, 0o600)
        try:
            regular = stat.S_ISREG(os.fstat(handle).st_mode)
        finally:
            os.close(handle)
    except OSError as error:
        said = f"cannot write records to {path}: {error.strerror}"
        if error.errno in NO_FILE:
            raise Refused(f"{said}; choose another results folder") from None
        raise StoreError(said) from error
    if not regular:
        raise Refused(f"{path} is not a regular file")


def _text(stored: bytes) -> str:
    """What is stored as text; damage that is no text any more is left to the row's sha256."""
    return stored.decode(errors="replace")


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=30.0, isolation_level=None)
    db.text_factory = _text
    try:
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA synchronous = FULL")
        _check(db, path)
        db.execute(f"PRAGMA journal_mode = {journal_mode(path.parent.resolve())}")
        with transaction(db, path):
            if _pragma(db, "user_version") == 0:
                for statement in TABLES.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {APPLICATION}")
                db.execute(f"PRAGMA user_version = {VERSION}")
    except BaseException:
        db.close()
        raise
    return db


def _check(db: sqlite3.Connection, path: Path) -> None:
    """Refuse a file of another program or a newer pardemo; raise on damage."""
    found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise _damage(found)
    version, tables = _pragma(db, "user_version"), _pragma(db, "schema_version")
    if tables and _pragma(db, "application_id") != APPLICATION:
        raise Refused(f"{path} is a database of another program; choose another results folder")
    if version > VERSION:
        raise Refused(
            f"{path} has schema {version}, this pardemo knows {VERSION}: use a newer pardemo, "
            "or another results folder"
        )
    if version == VERSION:
        with contextlib.closing(sqlite3.connect(":memory:")) as fresh:
            fresh.executescript(TABLES)
            lost = _columns(fresh) - _columns(db)
        if lost:
            raise _damage(f"no column {'.'.join(min(lost))}")


def _damage(said: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(said)
    error.sqlite_errorname = "SQLITE_CORRUPT"
    return error


def _columns(db: sqlite3.Connection) -> set[tuple[str, str]]:
    """Every table's columns; a flipped bit in a name passes SQLite's own check."""
    return set(
        db.execute(
            "SELECT t.name, c.name FROM sqlite_master t, pragma_table_info(t.name) c"
            " WHERE t.type = 'table'"
        )
    )


def _pragma(db: sqlite3.Connection, name: str) -> int:
    return int(db.execute(f"PRAGMA {name}").fetchone()[0])
