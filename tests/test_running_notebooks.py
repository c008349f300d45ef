"""Running notebooks: bad parameters are refused first, a failure leaves the file as it was."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest

from pardemo import notebooks
from pardemo.notebooks import NotebookFailed
from pardemo.parameters import Parameter, Refused, infer, validate

PARAMETERS = """steps: int = 3  # optimiser steps
names: list[str] = ["a", "b"]  # what to run
rate = 0.5  # no annotation"""


def write(folder: Path, name: str, *sources: str, tags: tuple[str, ...] = ("parameters",)) -> Path:
    """A small notebook whose first code cell holds the parameters."""
    cells = [nbformat.v4.new_markdown_cell("# Small"), nbformat.v4.new_code_cell(PARAMETERS)]
    cells[1].metadata = {"tags": list(tags), "nbmake": {"mock": {"steps": 1}}}
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty `notebooks` folder that notebooks.py takes for the real one."""
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    return tmp_path / "notebooks"


def test_only_notebooks_of_the_closed_list_are_found(folder: Path) -> None:
    path = write(folder, "04_ddp")
    assert notebooks.find("04") == notebooks.find("04_ddp") == path
    assert notebooks.find("notebooks/04_ddp.ipynb") == path
    with pytest.raises(Refused, match="did you mean '04_ddp'"):
        notebooks.find("04_dpd")
    with pytest.raises(Refused):
        notebooks.find("../../etc/passwd")


def test_parameters_are_read_with_type_default_and_help(folder: Path) -> None:
    known = notebooks.parameters(write(folder, "small"))
    assert known["steps"] == Parameter("steps", "int", "3", "optimiser steps")
    assert known["names"].type == "list[str]"
    assert known["rate"].type == "float"


@pytest.mark.parametrize(
    ("type_", "given", "value"),
    [
        ("int", "7", 7),
        ("float", "1e-3", 1e-3),
        ("float", 2, 2.0),
        ("bool", "yes", True),
        ("bool", False, False),
        ("str", "x", "x"),
        ("list[int]", "1,2, 4", [1, 2, 4]),
        ("list[str]", '["a", "b"]', ["a", "b"]),
        ("list[float]", [1, 2.5], [1.0, 2.5]),
        ("str | None", "none", None),
    ],
)
def test_values_of_the_command_line_get_the_parameters_type(
    type_: str, given: object, value: object
) -> None:
    got = Parameter("x", type_, "", "").value(given)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("type_", "given"),
    [("int", "many"), ("int", 1.5), ("int", True), ("bool", "perhaps"), ("str", 3),
     ("int", None), ("list[int]", "1,b"), ("list[int]", "__import__('os')")],
)  # fmt: skip
def test_a_value_of_another_type_is_refused_with_what_it_takes(type_: str, given: object) -> None:
    with pytest.raises(Refused, match="parameter x takes"):
        Parameter("x", type_, "", "").value(given)


def test_types_are_inferred_from_defaults() -> None:
    assert [infer(text) for text in ("3", "0.5", "True", "'a'", "[1, 2]", "None", "x + 1")] == [
        "int", "float", "bool", "str", "list[int]", "str | None", "str",
    ]  # fmt: skip


def test_an_unknown_parameter_is_refused_with_the_nearest_name_and_nothing_runs(
    folder: Path, tmp_path: Path
) -> None:
    path = write(folder, "small", f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(Refused, match="no parameter 'stps'; did you mean 'steps'"):
        notebooks.execute(path, given={"stps": 2})
    assert not (tmp_path / "ran").exists()
    with pytest.raises(Refused, match="there are: names"):
        validate({"zzz": 1}, {"names": Parameter("names", "str", "", "")}, "here")


def test_refresh_executes_in_the_notebooks_folder_and_normalises(folder: Path) -> None:
    path = write(folder, "small", "import os; print(os.getcwd(), steps)", "1")
    notebooks.refresh(path)
    done = nbformat.read(path, 4)
    assert [c.execution_count for c in done.cells if c.cell_type == "code"] == [1, 2, 3]
    assert done.cells[2].outputs[0].text == "./notebooks 3\n"
    assert set(done.metadata) == {"kernelspec", "language_info"}
    assert all("papermill" not in cell.metadata for cell in done.cells)
    before = path.read_bytes()
    notebooks.refresh(path)
    assert path.read_bytes() == before, "a second run changes nothing"


def test_given_parameters_and_mocks_reach_the_cells(folder: Path) -> None:
    path = write(folder, "small", "print(steps, names)")
    done = notebooks.execute(path, given={"steps": "5", "names": "x,y"})
    assert done.cells[-1].outputs[0].text == "5 ['x', 'y']\n"
    assert notebooks.mocks(path) == {"steps": 1}


def test_a_failing_cell_is_named_and_the_file_stays_as_it_was(folder: Path) -> None:
    path = write(folder, "small", "print(1)", "# broken\nsteps / 0", "print(2)")
    before = path.read_bytes()
    with pytest.raises(NotebookFailed, match=r"small\.ipynb, cell 3: ZeroDivisionError.*# broken"):
        notebooks.refresh(path)
    assert path.read_bytes() == before
    assert [p.name for p in folder.iterdir()] == ["small.ipynb"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import warnings; warnings.warn('loud')", "shows a warning, 'UserWarning: loud'"),
        ("print('/' + 'home/somebody/x')", "shows a path of this machine, '/home/s'"),
    ],
)
def test_what_may_not_be_stored_is_a_failure_and_the_file_stays(
    folder: Path, source: str, said: str
) -> None:
    path = write(folder, "small", source)
    before = path.read_bytes()
    with pytest.raises(NotebookFailed, match=re.escape(said)):
        notebooks.refresh(path)
    assert path.read_bytes() == before


def test_an_error_that_a_tag_let_pass_is_not_stored_either() -> None:
    cell = nbformat.v4.new_code_cell("1 / 0", execution_count=1)
    cell.outputs = [nbformat.v4.new_output("error", ename="ZeroDivisionError", evalue="by zero")]
    skipped = nbformat.v4.new_code_cell("print(2)")
    found = notebooks.unfit(nbformat.v4.new_notebook(cells=[cell, skipped]))
    assert [text.split(" '")[1].split("' ")[0] for text in found] == ["1 / 0", "print(2)"]
    assert "ended with ZeroDivisionError: by zero" in found[0]
    assert "was not run" in found[1]


def test_a_widget_leaves_its_sentence_and_no_state(folder: Path) -> None:
    path = write(folder, "small", "from pardemo import explore\nexplore.live('ring')")
    assert notebooks.refresh(path) > 0
    done = nbformat.read(path, 4)
    assert "widgets" not in done.metadata
    (output,) = done.cells[-1].outputs
    assert list(output.data) == ["text/plain"]
    assert "run this cell in a live kernel" in output.data["text/plain"]


def test_a_killed_kernel_is_a_failure_that_names_the_cell(folder: Path) -> None:
    path = write(folder, "small", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    before = path.read_bytes()
    with pytest.raises(NotebookFailed, match=r"its kernel died"):
        notebooks.refresh(path)
    assert path.read_bytes() == before


def test_an_endless_cell_ends_at_the_timeout(folder: Path) -> None:
    path = write(folder, "small", "import time\ntime.sleep(600)")
    with pytest.raises(NotebookFailed, match="took too long"):
        notebooks.execute(path, timeout_s=3)


STOPPED = """
import sys
from pathlib import Path
from pardemo import notebooks
notebooks.refresh(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_when_the_runner_is_stopped_its_kernel_ends_and_the_file_is_as_it_was(
    folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    note = tmp_path / "kernel"
    path = write(
        folder, "small", f"import os; open({str(note)!r}, 'w').write(str(os.getpid()))",
        "import time; time.sleep(600)",
    )  # fmt: skip
    before = path.read_bytes()
    runner = subprocess.Popen([sys.executable, "-c", STOPPED, path], stderr=subprocess.DEVNULL)
    kernel = int(wait_for(lambda: note.exists() and note.read_text()))
    os.kill(runner.pid, number)
    runner.wait(timeout=60)
    assert wait_for(lambda: not psutil.pid_exists(kernel)), "the kernel is still there"
    assert path.read_bytes() == before
    assert [p.name for p in folder.iterdir()] == ["small.ipynb"]


def wait_for(found: Callable[[], object], seconds: float = 60.0) -> Any:
    """What `found()` returns as soon as that is true."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := found():
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds:g} s")
