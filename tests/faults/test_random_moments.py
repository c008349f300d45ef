"""Commands as a user types them, hit at a random moment of their whole life: while Python imports,
while they start, work, write and end. A judge that knows nothing of what goes on inside.

Each hit must end the command in time, with the right exit code and one clear word, leave no
process, listener or file, and lose no record. A few in `make test`, twenty of each kind in `make
soak`. Run with `-s` to read what each hit met.
"""

from __future__ import annotations

import functools
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from pardemo import records, scratch
from pardemo.records import lock

from .harness import ROOT, Program, clear, gone_within, left_in, nothing_left

pytestmark = pytest.mark.timeout(400)
PARDEMO = (sys.executable, "-m", "pardemo")
GONE_S = 5.0
END_S = 40.0
# name -> signal, and whether to its whole process group, as a terminal's Ctrl-C
HITS = {
    "interrupt": (signal.SIGINT, False),
    "ctrl-c": (signal.SIGINT, True),
    "terminate": (signal.SIGTERM, False),
    "hang up": (signal.SIGHUP, False),
    "kill": (signal.SIGKILL, False),
}
SCRIPT = """
import torch, torch.distributed as dist
from pardemo import Ranks, launch
def add_up():
    value = torch.ones(3)
    dist.all_reduce(value)
    return value.sum().item()
for _ in range(3):
    assert list(launch(add_up, nprocs=2)) == [6.0, 6.0]
with Ranks(2) as ranks:
    for _ in range(500):
        ranks(add_up)
print("all done")
"""
SPAWNS = """
import torch.distributed as dist
from pardemo import launch
assert list(launch(dist.get_rank, nprocs=2, start="spawn")) == [0, 1]
"""
SWEEP = """
benchmark: scaling
parameters: {model: mlp, batch_size: 16, most_ranks: 2, seconds: 1.0, results: ""}
grid: {rounds: [4, 5]}
"""
PLAN = ("plan", "--model", "llama3-8b", "--ranks", "16")
# what may stand in standard error of a command that was stopped
USUAL = re.compile(r"(note: .*|\d+/\d+ .* \.\.\.|stopped(; the same sweep goes on where it was)?|)")
FIRST = {"__init__.py", "stop.py"}  # what Python reads of pardemo before a Ctrl-C is its own
# what torch says of a Ctrl-C as it ends, and NumPy, whose import torch tries again after one
THEIRS = ("torch/library.py", "cannot load module more than once per process")


@dataclass(frozen=True)
class Subject:
    """What is started, how long it lives when nobody disturbs it, and how it may end then."""

    words: Sequence[str]
    source: str | None = None
    clears: bool = False  # has something to clear away when it is told to end
    endless_s: float = 0.0  # of those that do not end by themselves

    def start(self, folder: Path, *more: str, ignored: bool = False) -> Program:
        return Program(folder, self.source, *more, command=self.words, sigint_ignored=ignored)


SUBJECTS = {
    "script": Subject((sys.executable,), SCRIPT),
    "spawn": Subject((sys.executable,), SPAWNS),
    "plan": Subject((*PARDEMO, *PLAN)),
    "doctor": Subject((*PARDEMO, "doctor")),
    "notebook": Subject((*PARDEMO, "notebooks", "scaling", "--mock"), clears=True),
    "lab": Subject((*PARDEMO, "lab", "--no-browser"), clears=True, endless_s=12.0),
}
ALWAYS = {  # in `make test` too
    ("script", "interrupt"), ("script", "kill"), ("spawn", "ctrl-c"), ("spawn", "terminate"),
    ("plan", "interrupt"), ("notebook", "terminate"), ("lab", "hang up"),
}  # fmt: skip
PAIRS = [
    pytest.param(name, hit, marks=() if (name, hit) in ALWAYS else pytest.mark.soak)
    for name in SUBJECTS
    for hit in HITS
]


@functools.cache
def lifetime_s(name: str) -> float:
    """How long a subject lives undisturbed, here and now."""
    subject = SUBJECTS[name]
    if subject.endless_s:
        return subject.endless_s
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        program = subject.start(Path(folder))
        assert program.end(150) == 0, program.err
        return time.monotonic() - began


def check_ending(
    program: Program, code: int, number: int, subject: Subject, temporary: Path
) -> None:
    """The exit code and the words fit the signal, or it had ended well before."""
    said = f"{code}\n{program.out[-800:]}\n{program.err[-3000:]}"
    lines = program.said
    reached = set(re.findall(re.escape(str(ROOT / "pardemo")) + r'/(\S+)"', program.err))
    if subject.source is None and code in (1, -signal.SIGINT) and reached <= FIRST:
        assert program.err.rstrip().endswith("KeyboardInterrupt") or "init_import_site" in said
        return  # Python itself was starting
    if subject.source and not reached and any(words in said for words in THEIRS):
        assert number == signal.SIGINT, said
        return
    shell = -number if subject.source else 128 + number
    allowed = {0, shell}
    if number == signal.SIGKILL or (number != signal.SIGINT):
        allowed.add(-number)  # nothing had begun that wants clearing away
    assert code in allowed, said
    if subject.source is not None:
        assert "Exception ignored" not in program.err, said
        assert program.err.count("Traceback") <= 1, said
        if code == -signal.SIGINT:
            # nothing is said where Python is about to start, or has ended
            assert lines[-1:] in ([], ["KeyboardInterrupt"]), said
        return
    if "lab" not in subject.words:  # what Jupyter's server logs is its own
        assert [line for line in lines if not USUAL.fullmatch(line)] == [], said
        assert (code > 128) == (lines[-1:] in (["stopped"], [STOPPED])), said


STOPPED = "stopped; the same sweep goes on where it was"


def clear_away(temporary: Path, program: Program, number: int, subject: Subject) -> None:
    """Nothing lies about, but for what a killed command cannot take away itself: the next does."""
    if number == signal.SIGKILL and subject.source is None:
        scratch.sweep()
    # beside the program's own folder, and that of the lock of timed runs
    assert left_in(temporary, program.folder.name, lock.lock_path().parent.name) == []
    clear(temporary)


@pytest.mark.twenty
@pytest.mark.parametrize(("name", "hit"), PAIRS)
def test_a_command_hit_at_a_random_moment_leaves_nothing(
    tmp_path: Path, name: str, hit: str, turn: int
) -> None:
    """Every second time with SIGINT ignored, as after `command &`, where it is not SIGINT."""
    number, group = HITS[hit]
    subject, chance = SUBJECTS[name], random.Random(f"{name} {hit} {turn}")
    after_s = chance.uniform(0.02, lifetime_s(name))
    with nothing_left(tmp_path, within_s=GONE_S) as temporary:
        ignored = number != signal.SIGINT and turn % 2 == 0
        program = subject.start(temporary, ignored=ignored)
        time.sleep(after_s)
        family = program.family() if program.process.poll() is None else []
        if family:
            program.send(number, group)
        code = program.end(END_S)
        print(f"\n{name}, {hit} after {after_s:.2f} s: {code} {program.err[-200:]!r}")
        assert gone_within(family, GONE_S) == []
        check_ending(program, code, number, subject, temporary)
        clear_away(temporary, program, number, subject)


def cases(results: Path) -> dict[str, str]:
    """The cases of every run recorded there, by run and name: how each ended."""
    if not (results / "pardemo.sqlite").exists():
        return {}
    store = records.open(results / "pardemo.sqlite")
    assert store.db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    found = {f"{run.id} {c.name}": c.status for run in store.runs() for c in store.cases(run.id)}
    store.close()
    return found


def statuses(results: Path) -> list[str]:
    store = records.open(results / "pardemo.sqlite")
    found = [run.status for run in store.runs() if run.name == "sweep"]
    store.close()
    return found


@pytest.fixture
def sweep(tmp_path: Path) -> list[str]:
    """The words that start a sweep of two cases, and go on with it."""
    file = tmp_path / "sweep.yml"
    file.write_text(SWEEP)
    return [*PARDEMO, "bench", "--sweep", str(file), "--results", str(tmp_path / "results")]


BENCH = Subject((*PARDEMO, "bench"), clears=True)
SWEEP_S = 40.0  # about what the sweep takes


@pytest.mark.timeout(5400)
@pytest.mark.parametrize("hits", [1, pytest.param(20, marks=pytest.mark.soak)])
def test_a_sweep_hit_again_and_again_loses_no_case(
    tmp_path: Path, sweep: list[str], hits: int
) -> None:
    """Each time it goes on where it was, until it is through; then a new one is hit."""
    chance, results, number = random.Random(hits), tmp_path / "results", 0
    with nothing_left(tmp_path, within_s=GONE_S) as temporary:
        while number < hits:
            hit = chance.choice(sorted(HITS))
            before = cases(results)
            program = Program(temporary, None, command=sweep)
            time.sleep(after_s := chance.uniform(0.02, SWEEP_S))
            family = program.family() if program.process.poll() is None else []
            if family:
                number += 1
                program.send(*HITS[hit])
            code = program.end(END_S)
            print(f"\nsweep, {hit} after {after_s:.1f} s: {code} {program.err[-120:]!r}")
            assert gone_within(family, GONE_S) == []
            check_ending(program, code, HITS[hit][0], BENCH, temporary)
            after = cases(results)
            assert before.items() <= after.items(), "a case was lost, or measured again"
            clear_away(temporary, program, HITS[hit][0], BENCH)
            if (results / "pardemo.sqlite").exists():
                *old, last = statuses(results)
                assert set(old) <= {"done"}, "a run was left, not gone on with"
                # a signal that comes when all is done ends Python itself
                assert code in (0, -HITS[hit][0]) if last == "done" else code != 0
                assert last in ("done", "interrupted") or HITS[hit][0] == signal.SIGKILL
        program = Program(temporary, None, command=sweep)
        assert program.end(600) == 0, program.err
        clear_away(temporary, program, 0, BENCH)
    assert set(statuses(results)) == {"done"}
    assert len(cases(results)) == 2 * len(statuses(results))


ROLES = {"keeper.py": "keeper", "ipykernel_launcher": "kernel", "resource_tracker": "tracker"}


def role(process: psutil.Process) -> str:
    """What a process below a benchmark is."""
    line = " ".join(process.cmdline())
    if "pardemo.launch.zygote" in line:
        parent = process.parent()
        forked = parent is not None and "pardemo.launch.zygote" in " ".join(parent.cmdline())
        return "rank" if forked else "fork server"
    return next((what for word, what in ROLES.items() if word in line), line[-60:])


# what is said of a case whose process of that role was killed
SAYS = {
    "rank": r"rank \d of \d was killed by signal SIGKILL",
    "kernel": "its kernel died",
    "keeper": "its kernel died",
    "fork server": "the process that forks ranks was ended|fork server|killed by signal SIGKILL",
}


@pytest.mark.timeout(5400)
@pytest.mark.parametrize("hits", [1, pytest.param(20, marks=pytest.mark.soak)])
def test_a_process_of_a_benchmark_that_is_killed_is_named(
    tmp_path: Path, sweep: list[str], hits: int
) -> None:
    """Any process below it: the case fails in its own words, or the loss did not matter; the other
    case runs."""
    chance, results = random.Random(hits), tmp_path / "results"
    with nothing_left(tmp_path, within_s=GONE_S) as temporary:
        for number in range(hits):
            program = Program(temporary, None, command=[*sweep[:-1], str(results / str(number))])
            while program.process.poll() is None and not program.family()[1:]:
                time.sleep(0.02)  # it imports
            time.sleep(after_s := chance.uniform(0.0, SWEEP_S))
            below = program.family()[1:] if program.process.poll() is None else []
            what = ""
            if below:
                victim = chance.choice(below)
                what = role(victim)
                victim.kill()
            code = program.end(600)
            print(f"\n{what} killed after {after_s:.1f} s: {code} {program.err[-300:]!r}")
            assert gone_within(below, GONE_S) == []
            found = cases(results / str(number))
            assert len(found) == 2
            assert code == int("failed" in found.values())
            assert "Traceback" not in program.err
            if code:
                assert re.search(SAYS.get(what, "FAILED"), program.err), (what, program.err)
            clear_away(temporary, program, 0, BENCH)
