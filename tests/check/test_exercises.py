"""Every exercise can be solved with its own solution, starts unsolved, and knows wrong answers."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import nbformat
import pytest

from pardemo import check

ROOT = Path(__file__).resolve().parents[2]
FENCED = re.compile(r"```python\n(.*?)```", re.S)
CALL = re.compile(r"check\.lesson(\d\d)\.(\w+)\(")


class Exercise(NamedTuple):
    """A stub, its solution, the cell that checks it, and what the notebook imports."""

    lesson: str
    name: str
    stub: str
    solution: str
    call: str
    imports: str


def exercises() -> list[Exercise]:
    found = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, 4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        imports = "\n".join(re.findall(r"^(?:import|from) [^(\n]+$", code, re.M))
        for i, cell in enumerate(cells):
            if "exercise" in cell.metadata.get("tags", []):
                solution = "\n".join(FENCED.findall(cells[i + 1].source))
                near = [c.source for c in cells[i : i + 3] if c.cell_type == "code"]
                call = next(line for line in "\n".join(near).splitlines() if CALL.search(line))
                lesson, name = CALL.search(call).groups()  # type: ignore[union-attr]
                stub = cell.source.replace(call, "")
                found.append(Exercise(lesson, name, stub, solution, call, imports))
    return found


EXERCISES = exercises()


def answer(exercise: Exercise, cell: str) -> check.Verdict:
    """Run the imports, the cell with the answer, and the check; what the check says."""
    names: dict[str, Any] = {"check": check}
    exec(exercise.imports, names)
    exec(cell, names)
    return eval(exercise.call, names)


def label(exercise: Exercise) -> str:
    return f"{exercise.lesson}-{exercise.name}"


@pytest.mark.parametrize("exercise", EXERCISES, ids=label)
def test_the_fenced_solution_passes(exercise: Exercise) -> None:
    assert exercise.solution, "no fenced solution in the cell after the stub"
    said = answer(exercise, exercise.solution)
    assert said.status == "passed", said


@pytest.mark.parametrize("exercise", EXERCISES, ids=label)
def test_the_stub_does_not_pass_and_does_not_raise(exercise: Exercise) -> None:
    assert answer(exercise, exercise.stub).status in ("not attempted", "not yet")


def wrong(lesson: str) -> ModuleType:
    path = ROOT / "tests" / "check" / f"wrong_answers_{lesson}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("exercise", EXERCISES, ids=label)
def test_wrong_answers_are_told_not_yet(exercise: Exercise) -> None:
    answers = wrong(exercise.lesson).WRONG[exercise.name]
    assert len(answers) >= 2
    checker = getattr(getattr(check, f"lesson{exercise.lesson}"), exercise.name)
    for number, given in enumerate(answers):
        assert checker(given).status == "not yet", f"wrong answer {number} of {exercise.name}"


def test_every_lesson_has_three_exercises() -> None:
    counts: dict[str, int] = {}
    for exercise in EXERCISES:
        counts[exercise.lesson] = counts.get(exercise.lesson, 0) + 1
    lessons = {path.name[:2] for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {lesson: counts.get(lesson, 0) for lesson in lessons} == dict.fromkeys(lessons, 3)
