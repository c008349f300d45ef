"""Records survive what happens to machines: kills, full disks, damage, and two writers at once."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pardemo import records
from pardemo.parameters import Refused
from pardemo.records import Sample, schema, surroundings

TIMES = [Sample(number, 0, i, 0.1 + 0.001 * i) for number in range(8) for i in range(3)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results" / "pardemo.sqlite"


def test_a_run_is_read_back_as_it_was_written(path: Path) -> None:
    with records.open(path).begin("strategies", {"workload": "mlp"}) as run:
        run.add("ddp", {"step_s": 0.1, "ranks": 2}, TIMES)
    store = records.open(path)
    (row,) = store.runs()
    (case,) = store.cases(run.id)
    assert (row.name, row.status, row.parameters) == ("strategies", "done", {"workload": "mlp"})
    assert (case.name, case.values) == ("ddp", {"step_s": 0.1, "ranks": 2})
    assert store.samples(run.id, "ddp") == TIMES
    assert row.environment["machine"]["cores"] >= 1


def test_only_this_user_may_read_results(path: Path) -> None:
    records.open(path).begin("strategies")
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    for part in path.parent.iterdir():
        assert stat.S_IMODE(part.stat().st_mode) == 0o600, part


def test_a_symbolic_link_is_refused(path: Path, tmp_path: Path) -> None:
    path.parent.mkdir()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused, match="symbolic link"):
        records.open(path)
    assert not (tmp_path / "elsewhere").exists()


def test_a_case_can_be_recorded_once_only(path: Path) -> None:
    run = records.open(path).begin("strategies")
    run.add("ddp", {})
    with pytest.raises(Refused, match="ddp"):
        run.add("ddp", {})
    run.add("ddp", {}, repeat=1)
    assert run.missing(["ddp", "fsdp"]) == ["fsdp"]


def test_a_secret_in_the_environment_is_not_recorded(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_SECRET_TOKEN", "hunter2-in-a-variable")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    store = records.open(path)
    store.begin("strategies")
    told = store.runs()[0].environment
    assert told["variables"]["OMP_NUM_THREADS"] == "3"
    assert b"hunter2" not in path.read_bytes()
    assert "hunter2" not in str(told)


@pytest.mark.parametrize("name", ["", "../x", "a\nb", "ddp'; DROP TABLE runs", "x" * 200])
def test_names_of_records_are_harmless(path: Path, name: str) -> None:
    run = records.open(path).begin("strategies")
    with pytest.raises(Refused):
        run.add(name, {})


WRITER = """
import sys
from pathlib import Path
from pardemo import records
from pardemo.records import Sample
store = records.open(sys.argv[1])
run = store.begin("kill", {})
print(run.id, flush=True)
for number in range(int(sys.argv[2])):
    run.add(f"case-{number}", {"n": number}, [Sample(0, 0, i, 1.0) for i in range(20)])
    print(number, flush=True)
"""


def test_killed_while_recording_no_acknowledged_case_is_lost_and_the_run_resumes(
    path: Path,
) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, path, "100000"], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    run_id = writer.stdout.readline().strip()
    acknowledged = [int(writer.stdout.readline()) for _ in range(30)]
    os.kill(writer.pid, signal.SIGKILL)
    acknowledged += [int(line) for line in writer.stdout.read().split()]
    writer.wait(timeout=30)
    store = records.open(path)
    there = {case.values["n"] for case in store.cases(run_id)}
    assert set(acknowledged) <= there
    assert store.db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert store.find(run_id).status == "lost"
    again = store.resume("kill", {})
    assert again is not None
    assert again.id == run_id
    names = [f"case-{number}" for number in range(len(there) + 2)]
    assert again.missing(names) == names[-2:]


def test_a_finished_run_or_other_parameters_are_not_resumed(path: Path) -> None:
    store = records.open(path)
    with store.begin("strategies", {"steps": 1}):
        pass
    assert store.resume("strategies", {"steps": 1}) is None
    with pytest.raises(KeyboardInterrupt), store.begin("strategies", {"steps": 2}):
        raise KeyboardInterrupt
    assert store.runs()[-1].status == "interrupted"
    assert store.resume("strategies", {"steps": 3}) is None
    resumed = store.resume("strategies", {"steps": 2})
    assert resumed is not None
    assert resumed.id == store.runs()[-1].id


def test_four_writers_at_once_keep_every_row(path: Path) -> None:
    command = [sys.executable, "-c", WRITER, path, "15"]
    writers = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(4)]
    assert [writer.wait(timeout=120) for writer in writers] == [0] * 4
    store = records.open(path)
    assert [len(store.cases(run.id)) for run in store.runs()] == [15] * 4


def test_a_full_disk_is_named_and_earlier_rows_stay(path: Path) -> None:
    store = records.open(path)
    run = store.begin("strategies")
    run.add("small", {}, TIMES)
    pages = store.db.execute("PRAGMA page_count").fetchone()[0]
    store.db.execute(f"PRAGMA max_page_count = {pages + 2}")
    big = [Sample(0, 0, number, 1.0) for number in range(5000)]
    with pytest.raises(records.StoreError, match=r"disk is full.*pardemo\.sqlite.*earlier records"):
        run.add("big", {}, big)
    store.db.execute("PRAGMA max_page_count = 1000000")
    run.add("big", {}, big)
    assert [case.name for case in records.open(path).cases(run.id)] == ["small", "big"]


def test_a_file_that_may_not_be_written_is_read_and_refuses_to_be_added_to(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For root, whom no permission stops: the answer of os.access is what another user gets."""
    store = records.open(path)
    run = store.begin("strategies")
    run.add("small", {"step_s": 1.0}, TIMES)
    store.close()
    before = path.read_bytes()
    monkeypatch.setattr("pardemo.records.store.os.access", lambda *_: False)
    reader = records.open(path)
    assert [case.name for case in reader.cases(reader.find("last").id)] == ["small"]
    with pytest.raises(records.StoreError, match=r"pardemo\.sqlite cannot be written.*permissions"):
        reader.begin("strategies")
    reader.close()
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["garbage", "truncated", "zeroed page"])
def test_a_damaged_file_is_set_aside_never_deleted(path: Path, damage: str) -> None:
    store = records.open(path)
    run = store.begin("strategies")
    for number in range(20):
        run.add(f"case-{number}", {}, TIMES)
    store.close()
    whole = path.read_bytes()
    hurt = {
        "garbage": b"not a database at all" * 500,
        "truncated": whole[: len(whole) // 2],
        "zeroed page": whole[:8192] + bytes(4096) + whole[12288:],
    }[damage]
    path.write_bytes(hurt)
    with pytest.warns(UserWarning, match="set aside"):
        fresh = records.open(path)
    assert fresh.runs() == []
    (aside,) = [p for p in path.parent.iterdir() if "damaged" in p.name and p.suffix[-4:] != "-wal"]
    assert aside.read_bytes() == hurt


def test_flipped_bytes_are_named_by_the_rows_hash(path: Path) -> None:
    store = records.open(path)
    run = store.begin("strategies")
    run.add("good", {"step_s": 1.0})
    run.add("bad", {"step_s": 2.0}, TIMES)
    store.db.execute("UPDATE samples SET seconds = 9.0 WHERE name = 'bad' AND iteration = 1")
    with pytest.warns(UserWarning, match="case 'bad' #0"):
        assert [case.name for case in store.cases(run.id)] == ["good"]


def test_a_newer_schema_and_another_programs_database_are_refused_and_untouched(
    path: Path, tmp_path: Path
) -> None:
    store = records.open(path)
    store.db.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    store.close()
    with pytest.raises(Refused, match="newer pardemo"):
        records.open(path)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE theirs (a)")
    before = other.read_bytes()
    with pytest.raises(Refused, match="another program"):
        records.open(other)
    assert other.read_bytes() == before


def test_the_journal_suits_the_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    class Part:
        def __init__(self, mountpoint: str, fstype: str) -> None:
            self.mountpoint, self.fstype = mountpoint, fstype

    parts = [Part("/", "ext4"), Part("/home", "nfs4")]
    monkeypatch.setattr(schema.psutil, "disk_partitions", lambda all: parts)
    assert schema.journal_mode(Path("/var/x")) == "WAL"
    assert schema.journal_mode(Path("/home/me")) == "DELETE"


def test_the_environment_says_commit_versions_and_threads() -> None:
    told = surroundings.environment()
    assert told["packages"]["torch"] != "absent"
    assert set(told["variables"]) <= set(surroundings.VARIABLES)
