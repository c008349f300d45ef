"""Faults 34 to 37: a notebook's kernel killed, stopped; its runner killed; no room for its output;
hostile parameters. Kernel and grandchildren go, the record says failed, the old file stays."""

from __future__ import annotations

import ast
import os
import signal
import time
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from pardemo import bench, notebooks, records, sweep
from pardemo.notebooks import NotebookFailed
from pardemo.parameters import Refused
from pardemo.records import lock

from .harness import ROOT, Program, clear, gone_within, nothing_left

GONE_S = 5.0
MARK = str(os.getpid())
# the cell starts one child in its own group, one that has left for a session of its own, and one
# whose parent has ended already; then it does what the fault is
FAMILY = """
import os, subprocess, signal, sys, time
subprocess.Popen(["sleep", "860.{mark}"])
subprocess.Popen(["sleep", "861.{mark}"], start_new_session=True)
subprocess.run(["sh", "-c", "setsid sleep 862.{mark} & exit 0"])
print("started", flush=True)
open({note!r}, "w").write(str(os.getpid()))
"""
RUNNER = """
import sys
from pathlib import Path
from pardemo import cli, notebooks
notebooks.ROOT = Path(sys.argv[1])
sys.exit(cli.main(["notebooks", "small", "--mock"]))
"""
ENDS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGKILL: -9}
MANY = [3, pytest.param(20, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(notebooks, "ROOT", tmp_path / "clone")
    found = tmp_path / "clone" / "benchmarks"
    found.mkdir(parents=True)
    return found


def write(folder: Path, *cells: str) -> Path:
    first = new_code_cell("steps: int = 3  # steps of training\nname: str = 'x'  # whose")
    first.metadata["tags"] = ["parameters"]
    made = new_notebook(cells=[first, *map(new_code_cell, cells)])
    made.metadata["kernelspec"] = dict(notebooks.KERNEL)
    nbformat.write(made, folder / "small.ipynb")
    return folder / "small.ipynb"


def sleepers() -> list[psutil.Process]:
    """The grandchildren: they sleep for a time that only this process asks for."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [""])[-1].endswith(f".{MARK}")
    ]


def family_of(note: Path) -> list[psutil.Process]:
    """Kernel and grandchildren, once the cell has started them."""
    until = time.monotonic() + 150
    while not (note.exists() and note.read_text()):
        assert time.monotonic() < until, "the cell has not begun"
        time.sleep(0.05)
    found = [psutil.Process(int(note.read_text())), *sleepers()]
    assert len(found) == 4
    return found


@pytest.mark.twenty(3)
@pytest.mark.timeout(180)
@pytest.mark.parametrize("end", ["killed", "stopped", "endless"])
def test_a_kernel_that_dies_or_hangs_fails_its_case_and_leaves_nothing(
    folder: Path, tmp_path: Path, end: str
) -> None:
    """Rows 34 and 35: the cell is named, the record says failed, the next case runs."""
    fault = {
        "killed": "os.kill(os.getpid(), signal.SIGKILL)",
        "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
        "endless": "time.sleep(600)",
    }[end]
    note = tmp_path / "note"
    notebooks.execute(write(folder, "print(1)"))  # the first one keeps an event loop for the next
    path = write(folder, FAMILY.format(note=str(note), mark=MARK) + fault)
    with nothing_left(tmp_path):
        said = "its kernel died" if end == "killed" else "it took too long"
        with pytest.raises(NotebookFailed, match=said):
            notebooks.execute(path, timeout_s=None if end == "killed" else 4)
        assert gone_within(sleepers(), GONE_S) == []


RANKS = """
import os, signal, time
from multiprocessing import shared_memory
from pardemo import Ranks
kept = []
def share():
    kept.append(shared_memory.SharedMemory(create=True, size=64))
ranks = Ranks(2).__enter__()
ranks(share)
"""


@pytest.mark.twenty(3)
@pytest.mark.timeout(180)
@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(600)"])
def test_ranks_of_a_kernel_that_is_killed_leave_nothing(
    folder: Path, tmp_path: Path, end: str
) -> None:
    """No folder, no shared memory: their fork server has time to remove it. Seen to fail when the
    keeper kills it at once."""
    notebooks.execute(write(folder, "print(1)"))  # the first one keeps an event loop for the next
    path = write(folder, RANKS, end)
    said = "took too long" if "sleep" in end else "its kernel died"
    with nothing_left(tmp_path), pytest.raises(NotebookFailed, match=said):
        notebooks.execute(path, timeout_s=20)


DIES_AS_IT_STARTS = """
import os, sys
if "ipykernel_launcher" in sys.orig_argv:
    os.kill(os.getpid(), 9)
"""


def test_a_kernel_that_dies_while_it_starts_fails_its_case_and_the_next_one_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "lock_path", lambda: tmp_path / "own" / "timing.lock")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text(DIES_AS_IT_STARTS)
    path = write(folder, "print(1)")
    notebooks.execute(path)  # the first one keeps an event loop for the next
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    with nothing_left(tmp_path):
        cases = [sweep.checked(path.stem, {"steps": steps}) for steps in (1, 2)]
        assert bench.run(cases, tmp_path / "results") == 1
    store = records.open(tmp_path / "results" / "pardemo.sqlite")
    ended = store.cases(store.find("last").id)
    assert [case.status for case in ended] == ["failed", "failed"]
    assert all("its kernel died" in case.values["error"] for case in ended)
    store.close()


@pytest.mark.twenty
@pytest.mark.timeout(180)
def test_a_killed_kernel_is_recorded_as_failed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 34: although papermill marks the cells "completed"."""
    monkeypatch.setattr(lock, "lock_path", lambda: tmp_path / "own" / "timing.lock")
    path = write(folder, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    results = tmp_path / "results"
    assert bench.run([sweep.checked(path.stem, {})], results) == 1
    store = records.open(results / "pardemo.sqlite")
    (case,) = store.cases(store.find("last").id)
    assert (case.status, "its kernel died" in case.values["error"]) == ("failed", True)
    store.close()


def hit(folder: Path, tmp_path: Path, number: signal.Signals, ignored: bool = False) -> None:
    """Start a notebook, send the signal to its runner, and see that all is gone and as it was."""
    note = tmp_path / "note"
    note.unlink(missing_ok=True)
    path = write(folder, FAMILY.format(note=str(note), mark=MARK) + "time.sleep(600)")
    before = path.read_bytes()
    with nothing_left(tmp_path, within_s=2 * GONE_S) as temporary:
        runner = Program(temporary, RUNNER, str(notebooks.ROOT), sigint_ignored=ignored)
        there = [*family_of(note), *runner.family()]  # the keeper too
        runner.send(number)
        assert runner.end() == ENDS[number], runner.err
        assert gone_within(there, GONE_S) == []
        assert number == signal.SIGKILL or runner.err.endswith("stopped\n"), runner.err
        assert "died" not in runner.err, "its kernel was ended, as it should be"
        left = {entry for entry in temporary.iterdir() if entry != runner.folder}
        assert left == set(), "the keeper clears away what a killed runner cannot"
        clear(temporary)
    assert path.read_bytes() == before, "the notebook is as it was"


@pytest.mark.timeout(400)
@pytest.mark.parametrize("times", MANY)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_when_the_runner_is_killed_kernel_and_grandchildren_go(
    folder: Path, tmp_path: Path, number: signal.Signals, times: int
) -> None:
    """Row 36, from the second time on with SIGINT ignored, as after `command &`. Seen to fail
    without keeper.py: two of the three sleepers stayed for ever."""
    for time_ in range(times):
        hit(folder, tmp_path, number, ignored=time_ > 0)


@pytest.mark.twenty(3)
@pytest.mark.timeout(120)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name)
def test_a_runner_that_is_stopped_clears_away(
    folder: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    hit(folder, tmp_path, signum)


ENDS_SLOWLY = """
import atexit, time
atexit.register(time.sleep, 3)
"""


@pytest.mark.twenty(3)
@pytest.mark.timeout(120)
def test_a_runner_that_is_stopped_while_its_kernel_starts_leaves_nothing(
    folder: Path, tmp_path: Path
) -> None:
    """Seen to fail where the kernel is left to the runner's own end: its folder was gone before,
    and IPython made one of its own."""
    write(folder, "print(1)")
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(ENDS_SLOWLY)
    with nothing_left(tmp_path, within_s=2 * GONE_S) as temporary:
        path = f"{tmp_path / 'slow'}:{ROOT}"
        runner = Program(temporary, RUNNER, str(notebooks.ROOT), PYTHONPATH=path)
        kernel = runner.wait_below("ipykernel_launcher")
        runner.send(signal.SIGHUP)
        assert runner.end() == ENDS[signal.SIGHUP], runner.err
        assert runner.err.endswith("stopped\n"), runner.err
        assert gone_within(kernel, GONE_S) == []
        assert [entry for entry in temporary.iterdir() if entry != runner.folder] == []
        clear(temporary)


@pytest.mark.timeout(120)
def test_without_the_keeper_grandchildren_would_stay(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guarantee broken on purpose: the checks above must catch it."""
    from jupyter_client import AsyncKernelManager

    monkeypatch.setattr(notebooks, "kept", lambda _: AsyncKernelManager)
    note = tmp_path / "note"
    path = write(
        folder, FAMILY.format(note=str(note), mark=MARK) + "os.kill(os.getpid(), signal.SIGKILL)"
    )
    with pytest.raises(NotebookFailed, match="its kernel died"):
        notebooks.execute(path)
    stayed = sleepers()
    for process in stayed:
        process.kill()
    assert stayed != []


@pytest.mark.twenty
@pytest.mark.timeout(120)
def test_a_full_disk_leaves_the_old_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 36: the new file is written beside the old one, which is replaced as a whole."""
    path = write(folder, "print('x' * 100)")
    before = path.read_bytes()

    def full(_: object, out: Any, *__: object) -> None:
        out.write("{half a note")
        raise OSError(28, "No space left on device")

    notebooks.execute(path)  # Jupyter keeps the event loop of a process's first one: 3 descriptors
    with nothing_left(tmp_path):
        done = notebooks.execute(path)
        with monkeypatch.context() as broken:
            broken.setattr(notebooks, "execute", lambda *_, **__: done)
            broken.setattr(notebooks.nbformat, "write", full)
            with pytest.raises(OSError, match="No space left"):
                notebooks.refresh(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in folder.iterdir()] == ["small.ipynb"]


HOSTILE_NAMES = [
    "a=1\nimport os; os.mkdir('PWN')\nb",
    "__import__('os').mkdir('PWN')",
    "steps;x",
    "",
]
HOSTILE_VALUES = [
    "x'; open('PWN', 'w'); '",
    'x"""\nopen("PWN", "w")\n"""',
    "$(touch PWN)",
    "{steps}",
    "\\'; open('PWN', 'w') #",
]


@pytest.mark.twenty
@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_hostile_parameter_name_is_refused_before_anything_runs(folder: Path, name: str) -> None:
    """Row 37: papermill pastes names into code as they are, so only the notebook's own pass."""
    path = write(folder, "open('RAN', 'w')")
    with pytest.raises(Refused, match="has no parameter"):
        notebooks.execute(path, given={name: 1})
    assert [entry.name for entry in folder.iterdir()] == ["small.ipynb"]


@pytest.mark.twenty
@pytest.mark.timeout(120)
def test_hostile_values_stay_text(folder: Path) -> None:
    """Row 37: all of them in one notebook, as the values of one list."""
    path = write(folder, "print(names == wanted)")
    first = nbformat.read(path, 4)
    first.cells[0].source = "names: list[str] = []  # of things\nwanted: list[str] = []  # the same"
    nbformat.write(first, path)
    plain = [value for value in HOSTILE_VALUES if value.isprintable()]
    done = notebooks.execute(path, given={"names": plain, "wanted": plain})
    assert done.cells[-1].outputs[0].text == "True\n"
    injected = next(c for c in done.cells if "injected-parameters" in c.metadata.get("tags", []))
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(injected.source).body
        if isinstance(node, ast.Assign)
    }
    assert values == {"names": plain, "wanted": plain}
    assert [entry.name for entry in folder.iterdir()] == ["small.ipynb"]
    for value in set(HOSTILE_VALUES) - set(plain):
        with pytest.raises(Refused, match="takes list"):
            notebooks.execute(path, given={"names": [value]})
