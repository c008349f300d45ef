"""Every lesson and benchmark: what is committed is clean, and it runs, exercises included.

The static part reads what is committed. The slow part runs each lesson once, through nbmake, with
the small values of its parameters cell; after every exercise's stub its solution is tried too.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode

from pardemo import notebooks
from pardemo.check import NotYet

ROOT = Path(__file__).resolve().parents[1]
LESSONS = list(notebooks.known("notebooks").values())
BENCHMARKS = list(notebooks.known("benchmarks").values())
EVERY = [*LESSONS, *BENCHMARKS]
LARGEST_BYTES = 400_000
LONGEST_CELL, MEDIAN_CELL = 25, 5
ABSOLUTE = re.compile(
    r"(?<![\w.:/<])/(?:home|root|tmp|Users|work|opt|usr|var|mnt|workspace)/\w|site-packages/\w+/\w+/\w+/"
)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"```python\n(.*?)```", re.DOTALL)
TIMEOUT_S = 600


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, 4)


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def lines(cell: NotebookNode) -> int:
    return len([line for line in cell.source.splitlines() if line.strip()])


def text_of(cell: NotebookNode) -> str:
    """Everything textual a code cell put out."""
    parts = []
    for output in cell.get("outputs", []):
        parts.append(output.get("text", ""))
        parts += [v for k, v in output.get("data", {}).items() if k.startswith("text/")]
    return "\n".join("".join(part) for part in parts)


def identity(path: Path) -> str:
    return path.stem


every = pytest.mark.parametrize("path", EVERY, ids=identity)
lessons = pytest.mark.parametrize("path", LESSONS, ids=identity)


def test_there_are_lessons_and_benchmarks() -> None:
    assert "00_start_here" in notebooks.known("notebooks")
    assert {"strategies", "scaling"} <= set(notebooks.known("benchmarks"))


@every
def test_it_was_executed_from_top_to_bottom_without_an_error(path: Path) -> None:
    cells = code(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    errors = [o for cell in cells for o in cell.outputs if o.output_type == "error"]
    assert errors == []


@every
def test_it_is_small_and_holds_no_widget_state_and_no_local_path(path: Path) -> None:
    assert path.stat().st_size < LARGEST_BYTES
    notebook = read(path)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert not {"papermill", "execution"} & set(cell.metadata)
        told = cell.source + (text_of(cell) if cell.cell_type == "code" else "")
        assert not ABSOLUTE.search(told), ABSOLUTE.search(told)
        assert "application/vnd.jupyter.widget-view+json" not in json.dumps(cell.get("outputs", []))


@every
def test_no_cell_shows_a_stray_warning(path: Path) -> None:
    loud = [
        cell.source.splitlines()[0]
        for cell in code(read(path))
        if re.search(r"Warning: |TCP without encryption|UserWarning", text_of(cell))
    ]
    assert loud == []


@every
def test_it_begins_with_one_title_and_asks_its_question_in_bold(path: Path) -> None:
    first = read(path).cells[0]
    assert first.cell_type == "markdown"
    assert re.match(r"# \S", first.source)
    bold = re.findall(r"\*\*(.+?)\*\*(?!\*)", first.source, re.DOTALL)
    assert any("?" in said for said in bold), "no question in bold"


@every
def test_its_parameters_are_typed_explained_and_mocked(path: Path) -> None:
    tagged = [c for c in read(path).cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    known = notebooks.parameters(path)
    assert known
    for line in tagged[0].source.splitlines():
        assert re.match(r"\w+: [\w\[\], ]+ = .+  # \S", line), (
            f"not `name: type = value  # help`: {line}"
        )
    mocked = notebooks.mocks(path)
    assert mocked, "no nbmake mock"
    for name, value in mocked.items():
        assert known[name].value(value) == value


@every
def test_cells_are_short_and_introduced_by_prose(path: Path) -> None:
    """At most two code cells in a row: one that computes, one that shows."""
    cells = read(path).cells
    assert max(lines(cell) for cell in code(read(path))) <= LONGEST_CELL
    bare = [
        cells[i].source.splitlines()[0]
        for i in range(2, len(cells))
        if all(cell.cell_type == "code" for cell in cells[i - 2 : i + 1])
    ]
    assert bare == [], "a third code cell in a row, without prose"


@lessons
def test_a_lesson_has_the_size_of_a_lesson(path: Path) -> None:
    notebook = read(path)
    assert 40 <= len(notebook.cells) <= 80
    assert median(lines(cell) for cell in code(notebook)) <= MEDIAN_CELL


@every
def test_links_lead_somewhere_and_images_have_alt_text(path: Path) -> None:
    dead, mute = [], []
    for cell in read(path).cells:
        if cell.cell_type != "markdown":
            continue
        for image, text, target in LINK.findall(cell.source):
            if image and not text.strip():
                mute.append(target)
            if re.match(r"[a-z]+:", target) or target.startswith("#"):
                continue
            if not (path.parent / target.split("#")[0]).exists():
                dead.append(target)
    assert dead == []
    assert mute == []


@every
def test_every_figure_is_followed_by_words(path: Path) -> None:
    """A picture's alt text is not shown by Jupyter, so its claim must stand below it as text."""
    for cell in code(read(path)):
        kinds = [set(o.get("data", {})) for o in cell.outputs]
        if any("image/png" in kind for kind in kinds):
            following = read(path).cells[[c.id for c in read(path).cells].index(cell.id) + 1 :]
            said = any("text/markdown" in kind for kind in kinds)
            soon = any("caption(" in nxt.source for nxt in following[:3])
            prints = any(o.output_type == "stream" for o in cell.outputs)
            prose = bool(following) and following[0].cell_type == "markdown"
            assert said or soon or prints or prose, cell.source


def exercises(notebook: NotebookNode) -> list[int]:
    return [
        i for i, cell in enumerate(notebook.cells) if "exercise" in cell.metadata.get("tags", [])
    ]


def solution_after(notebook: NotebookNode, place: int) -> tuple[str, int]:
    """The fenced solution of an exercise, and the place of the cell that checks it."""
    solution, check = "", -1
    for i in range(place, len(notebook.cells)):
        cell = notebook.cells[i]
        if i > place and "exercise" in cell.metadata.get("tags", []):
            break
        if cell.cell_type == "markdown" and "<b>Solution</b>" in cell.source:
            solution = "\n".join(FENCE.findall(cell.source))
        if cell.cell_type == "code" and "check.lesson" in cell.source and check < 0:
            check = i
    return solution, check


@lessons
def test_every_exercise_has_a_hint_a_solution_and_a_check(path: Path) -> None:
    notebook = read(path)
    assert len(exercises(notebook)) == 3
    hints = sum("<b>Hint</b>" in cell.source for cell in notebook.cells)
    assert hints >= 3
    for place in exercises(notebook):
        solution, check = solution_after(notebook, place)
        ast.parse(solution)
        assert solution.strip()
        assert check >= 0


def checks_used(notebook: NotebookNode) -> list[str]:
    found = re.findall(r"check\.lesson\d\d\.(\w+)\(", "\n".join(c.source for c in code(notebook)))
    return list(dict.fromkeys(found))


def wrong_answers(number: str) -> dict[str, list[Any]]:
    file = ROOT / "tests" / "check" / f"wrong_answers_{number}.py"
    spec = importlib.util.spec_from_file_location(f"wrong_answers_{number}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tables = [value for value in vars(module).values() if isinstance(value, dict) and value]
    return next(t for t in tables if all(isinstance(v, list) for v in t.values()))


@lessons
def test_every_check_rejects_at_least_two_wrong_answers(path: Path) -> None:
    number = path.stem[:2]
    checks: ModuleType = importlib.import_module(f"pardemo.check.lesson{number}")
    wrong = wrong_answers(number)
    used = checks_used(read(path))
    assert used
    for name in used:
        assert len(wrong[name]) >= 2, name
        for answer in wrong[name]:
            verdict = getattr(checks, name)(*(answer if isinstance(answer, tuple) else (answer,)))
            assert verdict.status == "not yet", f"{name}: {verdict!r}"
            assert NotYet.__name__ not in verdict.text


def with_solutions(notebook: NotebookNode) -> tuple[NotebookNode, list[str]]:
    """After every stub's check: its solution, and the check again; with the second checks' ids."""
    places = exercises(notebook)
    again = []
    for place in reversed(places):
        solution, check = solution_after(notebook, place)
        source = notebook.cells[check].source
        if check == place:  # stub and check in one cell: keep the lines that check
            source = "\n".join(line for line in source.splitlines() if "check.lesson" in line)
        tried = nbformat.v4.new_code_cell(solution)
        rechecked = nbformat.v4.new_code_cell(source)
        notebook.cells[check + 1 : check + 1] = [tried, rechecked]
        again.append(rechecked.id)
    return notebook, again


@pytest.mark.notebook
@pytest.mark.timeout(2 * TIMEOUT_S)
@every
def test_it_runs_with_small_values_and_every_solution_passes(path: Path, tmp_path: Path) -> None:
    from nbmake.nb_run import NotebookRun

    notebook, again = with_solutions(read(path))
    copy = tmp_path / path.name
    nbformat.write(notebook, copy)
    result = NotebookRun(copy, TIMEOUT_S).execute()
    assert result.error is None, result.error.trace if result.error else ""
    cells = {cell.id: cell for cell in result.nb.cells}
    for place in exercises(result.nb):
        first = text_of(cells[result.nb.cells[solution_after(result.nb, place)[1]].id])
        assert re.search("not attempted|not yet", first), f"the stub is told: {first}"
    for cell_id in again:
        assert "passed" in text_of(cells[cell_id]), text_of(cells[cell_id])
        assert "not yet" not in text_of(cells[cell_id]), text_of(cells[cell_id])
