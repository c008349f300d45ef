"""The house rules, checked in the source: who imports whom, sizes, and calls that are forbidden."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pardemo"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION = 300, 50

# room -> rooms of pardemo that it may import besides itself ("machine", "parameters", "scratch"
# and "stop" are small leaves). Rooms that are not listed are faces over the others and may import
# anything public.
ALLOWED = {
    "machine": set(),
    "parameters": set(),
    "scratch": set(),
    "stop": set(),
    "kernels": set(),
    "data": set(),
    "models": set(),
    "workloads": {"data", "models"},
    "launch": {"machine", "scratch"},
    "strategies": set(),
    "predict": set(),
    "measure": {"machine", "launch"},
    "check": {"strategies", "workloads", "launch", "measure", "predict", "machine", "models",
              "data", "cluster"},
    "records": {"measure", "machine", "parameters"},
    "plot": {"measure", "predict", "machine", "models", "data"},
    "notebooks": {"parameters", "scratch", "kernels"},
    "sweep": {"parameters", "notebooks"},
}  # fmt: skip
TEXTS = {path: path.read_text(encoding="utf-8") for path in FILES}
TREES = {path: ast.parse(text) for path, text in TEXTS.items()}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute dotted names that a file imports, wherever in the file, with their lines."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            name = ".".join(part for part in (base, node.module or "") if part)
            yield from ((f"{name}.{alias.name}", node.lineno) for alias in node.names)


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an expression, or the empty string."""
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else node.attr
    return node.id if isinstance(node, ast.Name) else ""


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Call):
            yield dotted(node.func), node


def test_rooms_import_only_what_the_house_allows() -> None:
    rooms = {room(path) for path in FILES}
    wrong = []
    for path in FILES:
        mine = room(path)
        if mine not in ALLOWED:
            continue
        for name, line in imports(path):
            other = name.split(".")[1] if name.startswith("pardemo.") else ""
            if other in rooms - {mine} - ALLOWED[mine]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []


def test_predict_never_sees_torch_or_a_measurement() -> None:
    seen = {
        name
        for path in FILES
        if room(path) == "predict"
        for name, _ in imports(path)
        if name.startswith(("torch", "pardemo.measure", "pardemo.launch"))
    }
    assert seen == set()


def test_models_and_data_never_mention_ranks() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in FILES
        if room(path) in ("models", "data", "workloads")
        for name, _ in imports(path)
        if name.startswith("torch.distributed")
    ]
    assert wrong == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path: Path) -> None:
    lines = len(TEXTS[path].splitlines())
    assert lines <= LONGEST_FILE, f"{lines} lines"
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
    }
    assert long == {}


FORBIDDEN = {
    "os.system": "no shell",
    "os.popen": "no shell",
    "time.time": "durations come from perf_counter or monotonic: the wall clock steps",
    "yaml.load": "safe_load",
    "yaml.unsafe_load": "safe_load",
    "pickle.load": "no pickle from files",
    "eval": "no code from text",
}
EXCUSED = {  # file -> the one forbidden call it needs, and why
    "launch/cell.py": ("eval", "shows the value of a cell's last line, typed by the learner"),
    "cluster/desk.py": ("time.time", "asks how far the wall clocks of two nodes are apart"),
    "measure/timeline.py": ("time.time", "torch.profiler's events are on the wall clock"),
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_forbidden_calls_are_not_made(path: Path) -> None:
    wrong = []
    for name, call in calls(path):
        said = {keyword.arg: keyword.value for keyword in call.keywords}
        shell = said.get("shell")
        if shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
            wrong.append(f"line {call.lineno}: shell=True")
        excused = EXCUSED.get(str(path.relative_to(PACKAGE)), ("", ""))[0]
        if name in FORBIDDEN and name != excused:
            wrong.append(f"line {call.lineno}: {name} ({FORBIDDEN[name]})")
        if name == "torch.load":
            safe = said.get("weights_only")
            if not (isinstance(safe, ast.Constant) and safe.value is True):
                wrong.append(f"line {call.lineno}: torch.load without weights_only=True")
    assert wrong == []


def test_only_notebooks_py_imports_papermill() -> None:
    users = {
        path.name
        for path in FILES
        for name, _ in imports(path)
        if name.split(".")[0] == "papermill"
    }
    assert users == {"notebooks.py"}


def test_no_exception_is_swallowed_in_silence() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or dotted(node.type) in ("Exception", "BaseException"))
        and all(isinstance(part, ast.Pass) for part in node.body)
    ]
    assert wrong == []


def exported() -> set[str]:
    """Every name that some `__init__` lists in `__all__`."""
    return {
        str(item.value)
        for path in FILES
        if path.name == "__init__.py"
        for node in TREES[path].body
        if isinstance(node, ast.Assign) and dotted(node.targets[0]) == "__all__"
        for item in ast.walk(node.value)
        if isinstance(item, ast.Constant)
    }


def test_every_module_and_everything_exported_says_what_it_is_for() -> None:
    public = exported()
    assert {"launch", "compare", "same", "sent_bytes"} <= public
    silent = [str(path.relative_to(ROOT)) for path in FILES if not ast.get_docstring(TREES[path])]
    silent += [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in FILES
        for node in TREES[path].body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and node.name in public
        and not ast.get_docstring(node)
    ]
    assert silent == []


def test_the_wrong_calls_would_be_found() -> None:
    source = "import os, torch\nos.system('x')\ntorch.load(f)\nsubprocess.run('x', shell=True)\n"
    path = PACKAGE / "made_up.py"
    TREES[path] = ast.parse(source)
    try:
        with pytest.raises(AssertionError, match="no shell"):
            test_forbidden_calls_are_not_made(path)
    finally:
        del TREES[path]
