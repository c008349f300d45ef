"""Faults 30 to 33 and 38: writers killed, several at once, no space, damaged files, clock steps.

Nothing acknowledged is lost, nothing is there twice, nothing damaged is deleted or believed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from pardemo import cli, records
from pardemo.parameters import Refused
from pardemo.records import Sample

from .harness import Program, nothing_left

SOAK = [pytest.mark.soak, pytest.mark.timeout(1800)]
WRITER = """
import random, sys, time
from pardemo import records
from pardemo.records import Sample
random.seed(7)
wanted = {f"case-{n}": [random.random() for _ in range(20)] for n in range(int(sys.argv[2]))}
store = records.open(sys.argv[1])
run = store.resume("sweep", {"seed": 7}) or store.begin("sweep", {"seed": 7})
print("run", run.id, flush=True)
for name in run.missing(list(wanted)):
    run.add(name, {"value": wanted[name][0]},
            [Sample(0, 0, i, seconds) for i, seconds in enumerate(wanted[name])])
    print("acknowledged", name, flush=True)
    time.sleep(float(sys.argv[3]))
store.end(run.id, "done")
print("all done", flush=True)
"""


def acknowledged(program: Program) -> list[str]:
    lines = program.out.splitlines()
    return [line.split()[1] for line in lines if line.startswith("acknowledged ")]


def content(path: Path) -> dict[str, tuple[object, list[float]]]:
    """Every case of the newest run, with its samples."""
    store = records.open(path)
    assert store.db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    run = store.find("last").id
    found = {
        case.name: (case.values, [s.seconds for s in store.samples(run, case.name)])
        for case in store.cases(run)
    }
    assert len(store.runs()) == 1, "a resumed run is the same run"
    store.close()
    return found


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=SOAK)])
def test_killed_at_random_moments_and_resumed_the_run_is_as_if_never_interrupted(
    tmp_path: Path, kills: int
) -> None:
    """Row 30: SIGKILL again and again, then to the end; SIGINT ignored every second time."""
    cases = 300 * kills
    pause_s = "0.002"  # no writer can be through before its kills: 0.6 s of pauses for 0.3 s each
    with nothing_left(tmp_path) as temporary:
        whole = tmp_path / "whole" / "pardemo.sqlite"
        straight = Program(temporary, WRITER, str(whole), str(cases), "0")
        path = tmp_path / "killed" / "pardemo.sqlite"
        kept: set[str] = set()
        for number in range(kills):
            writer = Program(
                temporary, WRITER, str(path), str(cases), pause_s, sigint_ignored=bool(number % 2)
            )
            writer.wait_for("run ")
            time.sleep(random.random() * 0.3)
            writer.send(signal.SIGKILL)
            assert writer.end() == -signal.SIGKILL
            new = acknowledged(writer)
            assert kept.isdisjoint(new), "a case that had been acknowledged was measured again"
            kept |= set(new)
            assert kept <= set(content(path))
            assert records.open(path).find("last").status == "lost"
        last = Program(temporary, WRITER, str(path), str(cases), "0")
        assert (last.end(60), straight.end(60)) == (0, 0)
        assert kept.isdisjoint(acknowledged(last))
        assert content(path) == content(whole)
        for entry in temporary.iterdir():
            shutil.rmtree(entry)


@pytest.mark.twenty
@pytest.mark.timeout(120)
def test_four_writers_at_once_keep_every_row(tmp_path: Path) -> None:
    """Row 31: each its own run in one file."""
    source = WRITER.replace('store.resume("sweep", {"seed": 7}) or ', "")
    path = tmp_path / "results" / "pardemo.sqlite"
    with nothing_left(tmp_path) as temporary:
        writers = [Program(temporary, source, str(path), "60", "0") for _ in range(4)]
        assert [writer.end(90) for writer in writers] == [0] * 4
        store = records.open(path)
        assert [(len(store.cases(run.id)), run.status) for run in store.runs()] == [
            (60, "done")
        ] * 4
        store.close()
        for entry in temporary.iterdir():
            shutil.rmtree(entry)


FULL = """
import os, sys
from pathlib import Path
from pardemo import cli, records
from pardemo.records import Sample
here = Path(sys.argv[1])
store = records.open(here / "r" / "pardemo.sqlite")
run = store.begin("full", {})
many = [Sample(0, 0, i, 1.0 + i) for i in range(2000)]
for n in range(1000):
    try:
        run.add(f"case-{n}", {}, many)
    except records.StoreError as error:
        print("said", error, flush=True)
        break
before = len(store.cases(run.id))
print("kept", before, n, flush=True)
where = ["--results", str(here / "r"), "--export", str(here / "e.csv")]
code = cli.main(["records", "last", *where, "--samples"])
print("export", code, (here / "e.csv").exists(), flush=True)
(here / "ballast").unlink()
run.add("afterwards", {}, many)
whole = store.db.execute("PRAGMA integrity_check").fetchone()[0]
print("afterwards", len(store.cases(run.id)), whole)
"""


@pytest.mark.twenty
@pytest.mark.timeout(120)
def test_on_a_disk_that_is_really_full_earlier_rows_stay_and_writing_goes_on_with_space(
    tmp_path: Path,
) -> None:
    """Row 32, on a file system of 3 MB that the writer fills itself."""
    place = tmp_path / "small"
    place.mkdir()
    script = tmp_path / "script.py"
    script.write_text(FULL)
    ballast = "dd if=/dev/zero of=$0/ballast bs=1024 count=1200 2>/dev/null"
    inside = f'mount -t tmpfs -o size=3m,mode=700 tmpfs "$0" && {ballast} && exec "$@"'
    done = subprocess.run(
        [*mounting(), "sh", "-c", inside, place, sys.executable, script, place],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert "the disk is full" in lines["said"], done.stderr
    assert str(place) in lines["said"]
    kept, reached = map(int, lines["kept"].split())
    assert kept == reached > 0
    assert lines["export"] == "1 False", "no half of an export"
    assert lines["afterwards"] == f"{kept + 1} ok"


def mounting() -> list[str]:
    """The words before a command that may mount: root's own, or a user's namespaces."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    words = ["unshare", *user, "--mount"]
    assert subprocess.run([*words, "true"], capture_output=True).returncode == 0, (
        "this needs the right to mount: root, or user namespaces"
    )
    return words


def fill(path: Path) -> dict[str, str]:
    """A results file of three runs; every case's value by name."""
    store = records.open(path)
    for number in range(3):
        with store.begin(f"run{number}", {}) as run:
            for case in range(10):
                samples = [Sample(r, 0, 0, 0.1) for r in range(4)]
                run.add(f"case{case}", {"value": f"{number}/{case}"}, samples)
    store.close()
    return {f"{n}/{c}": f"case{c}" for n in range(3) for c in range(10)}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=SOAK)])
def test_bytes_flipped_anywhere_are_noticed_never_believed(tmp_path: Path, seed: int) -> None:
    """Row 33: whatever is damaged, what is still read is true, and no error but ours comes out."""
    draw = random.Random(seed)
    path = tmp_path / "results" / "pardemo.sqlite"
    fill(path)
    whole = path.read_bytes()
    noticed = 0
    for _ in range(600 if seed else 40):
        folder = tmp_path / "hurt"
        folder.mkdir(mode=0o700)
        hurt = bytearray(whole)
        for _ in range(draw.choice([1, 1, 8, 200])):
            hurt[draw.randrange(len(hurt))] ^= 1 << draw.randrange(8)
        (folder / "pardemo.sqlite").write_bytes(hurt)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                store = records.open(folder / "pardemo.sqlite")
                for run in store.runs():
                    for case in store.cases(run.id):
                        assert case.values == {"value": f"{run.name[-1]}/{case.name[-1]}"}
                store.close()
            except (Refused, records.StoreError):
                noticed += 1
        noticed += bool(told)
        assert cli.main(["records", "--results", str(folder)]) in (0, 1, 2)
        shutil.rmtree(folder)
    assert noticed > 0


def test_a_status_that_is_no_text_any_more_is_noticed(tmp_path: Path) -> None:
    """Row 33: one bit of "done" made it no UTF-8, which SQLite refused to read."""
    path = tmp_path / "results" / "pardemo.sqlite"
    fill(path)
    path.write_bytes(path.read_bytes().replace(b"done", b"do\xeee"))
    with pytest.warns(UserWarning, match="fails its sha256"):
        store = records.open(path)
    assert store.runs() == []
    store.close()


def test_a_column_with_another_name_is_damage(tmp_path: Path) -> None:
    """Row 33: SQLite's own check has nothing against it."""
    path = tmp_path / "results" / "pardemo.sqlite"
    fill(path)
    path.write_bytes(path.read_bytes().replace(b"pid_started", b"pid_starteb"))
    with pytest.warns(UserWarning, match=r"damaged \(no column runs.pid_started\); set aside"):
        records.open(path).close()


def test_a_file_that_may_not_be_written_is_read_and_named_when_written(tmp_path: Path) -> None:
    """Row 33. Without the capability by which root writes everywhere."""
    path = tmp_path / "results" / "pardemo.sqlite"
    fill(path)
    source = """
import sys
from pardemo import cli, records
code = cli.main(["records", "--results", sys.argv[1]])
try:
    records.open(sys.argv[1] + "/pardemo.sqlite").begin("sweep")
except records.StoreError as error:
    sys.exit(f"{code}: {error}")
"""
    for entry in [path, path.parent]:
        entry.chmod(stat.S_IMODE(entry.stat().st_mode) & ~0o222)
    powerless = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
    done = subprocess.run(
        [*(powerless if os.geteuid() == 0 else []), sys.executable, "-c", source, path.parent],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    path.parent.chmod(0o700)
    assert "  done  started" in done.stdout
    assert done.stderr.startswith(f"0: {path} cannot be written: ")
    assert done.stderr.endswith("; check its permissions\n")
    assert done.stderr.count("\n") == 1


def test_a_clock_that_steps_back_changes_no_order_and_no_duration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 38: the wall clock is set back by an hour between and within runs."""
    import datetime as module

    from pardemo.records import store as room

    class Stepping(module.datetime):
        step = 0

        @classmethod
        def now(cls, tz: module.tzinfo | None = None) -> module.datetime:
            Stepping.step -= 1800
            return module.datetime.now(tz) + module.timedelta(seconds=cls.step)

    monkeypatch.setattr(room, "datetime", Stepping)
    opened = records.open(tmp_path / "results" / "pardemo.sqlite")
    made = []
    for number in range(3):
        with opened.begin(f"run{number}", {}) as run:
            run.add("a", {}, [Sample(0, 0, 0, 0.25)])
            run.add("b", {}, [Sample(0, 0, 0, 0.5)])
        made.append(run.id)
    assert made == sorted(made, reverse=True), "the ids do carry the clock that went back"
    assert [row.id for row in opened.runs()] == made, "but the order is that of writing"
    assert opened.find("last").id == made[-1]
    assert [case.name for case in opened.cases(made[0])] == ["a", "b"]
    assert opened.samples(made[0], "a")[0].seconds == 0.25
