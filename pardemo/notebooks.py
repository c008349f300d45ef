"""Run notebooks: lessons and benchmarks from a closed list, through papermill, and normalise them.

This is the only module that calls papermill. Facts it works around (papermill 2.7, ipykernel 7.4):
unknown parameters are only warned of; a killed kernel leaves its cells marked "completed"; a
stopped kernel hangs; what a killed kernel started goes on; every kernel prints a warning about TCP
although it listens on loopback only.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from . import scratch
from .kernels import kept, kernels_in
from .parameters import Parameter, Refused, infer, nearest, validate

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("notebooks", "benchmarks")
TIMEOUT_S = 900  # per cell; ends an endless cell or a stopped kernel
QUIET_KERNEL = ["--IPKernelApp.log_level=40"]
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
DROPPED = [f"metadata.{key}" for key in ("widgets", "papermill", "jupytext", "toc", "vscode")]
DROPPED += [
    f"cell.metadata.{key}"
    for key in ("papermill", "execution", "ExecuteTime", "collapsed", "lines_to_next_cell")
]


LOCAL = re.compile(
    r"(?<![\w.:/<~])/(?:home|root|tmp|Users|opt|usr|var|mnt|workspace)/\w"
    r"|site-packages/\w+/\w+/\w+/"
)
STRAY = re.compile(r"\w*Warning: |TCP without encryption")
WIDGET = "application/vnd.jupyter.widget-view+json"


class NotebookFailed(RuntimeError):
    """A notebook stopped; says which cell, what it began with, and the error."""


def known(folder: str | None = None) -> dict[str, Path]:
    """Every notebook that may be run, by name: the closed list that is beside the package."""
    folders = FOLDERS if folder is None else (folder,)
    return {path.stem: path for name in folders for path in sorted((ROOT / name).glob("*.ipynb"))}


def find(name: str, folder: str | None = None) -> Path:
    """The path of a known notebook ("04_ddp", "04", "strategies"); Refused for any other."""
    there = known(folder)
    if not there:
        raise Refused(f"no {folder or 'notebooks'} beside {ROOT}: run pardemo from its clone")
    short = name.removesuffix(".ipynb").rsplit("/", 1)[-1]
    matches = [stem for stem in there if stem == short or stem.split("_", 1)[0] == short]
    if len(matches) != 1:
        raise Refused(f"no notebook {name!r}; {nearest(short, there)}")
    return there[matches[0]]


def read(path: Path) -> NotebookNode:
    """A notebook, for the kernel of the Python that runs this."""
    notebook = nbformat.read(path, 4)
    notebook.metadata["kernelspec"] = dict(KERNEL)
    return notebook


def parameters(path: Path) -> dict[str, Parameter]:
    """The notebook's parameters by name, read from its tagged cell without running anything."""
    import papermill

    with scratch.folder() as temporary:
        copy = temporary / path.name
        nbformat.write(read(path), copy)
        found = papermill.inspect_notebook(str(copy))
    return {
        name: Parameter(
            name,
            infer(entry["default"]) if _untyped(entry) else entry["inferred_type_name"].strip(),
            entry["default"],
            entry["help"].strip(),
        )
        for name, entry in found.items()
    }


def mocks(path: Path) -> dict[str, Any]:
    """The smaller values that tests use, from the parameters cell's nbmake metadata."""
    for cell in read(path).cells:
        if "parameters" in cell.metadata.get("tags", []):
            return dict(cell.metadata.get("nbmake", {}).get("mock", {}))
    return {}


def execute(
    path: Path,
    output: Path | None = None,
    given: Mapping[str, Any] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> NotebookNode:
    """Run a notebook in its own folder with checked parameters; returns the executed notebook.

    `output` receives it too, also when a cell fails, so that it can be read. Raises Refused before
    anything runs when a parameter does not fit, NotebookFailed when a cell fails.
    """
    import papermill

    checked = validate(given or {}, parameters(path), path.name)
    with scratch.folder() as temporary, kernels_in(temporary):
        target = output or temporary / path.name
        try:
            return papermill.execute_notebook(
                read(path),
                str(target),
                parameters=checked,
                cwd=str(path.parent),
                progress_bar=False,
                execution_timeout=timeout_s,
                autosave_cell_every=2,
                extra_arguments=QUIET_KERNEL,
                kernel_manager_class=kept(temporary),
            )
        except papermill.PapermillExecutionError as error:
            raise NotebookFailed(
                f"{path.name}, cell {error.exec_count or error.cell_index}: "
                f"{error.ename}: {_plain(error.evalue)}; "
                f"the cell begins with {_first_line(error.source)!r}"
            ) from error
        except Exception as error:
            dead = "Dead" in type(error).__name__ or "Kernel died" in str(error)  # as it started
            if not dead and type(error).__name__ != "CellTimeoutError":
                raise
            cell = _running(target)
            what = "its kernel died" if dead else "it took too long"
            raise NotebookFailed(
                f"{path.name}{cell}: {what} ({_first_line(_plain(str(error)))})"
            ) from error


def refresh(path: Path, mock: bool = False, timeout_s: float = TIMEOUT_S) -> float:
    """Execute a notebook in place and normalise it; returns the seconds that its cells took.

    On any failure, or when stopped, the file stays as it was; what may not be stored (an error, a
    stray warning, a path of this machine) is a failure too: NotebookFailed names it. `mock` runs
    the notebook with the smaller values of the tests and never touches the file.
    """
    began = time.monotonic()
    done = execute(path, given=mocks(path) if mock else None, timeout_s=timeout_s)
    taken_s = time.monotonic() - began
    clean = normalise(done)
    if faults := unfit(clean):
        raise NotebookFailed(f"{path.name} ran, but cannot be stored: {'; '.join(faults)}")
    if mock:
        return taken_s
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=".ipynb", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            nbformat.write(clean, out)
        os.chmod(name, path.stat().st_mode & 0o777)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    return taken_s


def unfit(notebook: NotebookNode) -> list[str]:
    """Why outputs may not be committed: errors, stray warnings, cells not run, local paths."""
    found = []
    for cell in (c for c in notebook.cells if c.cell_type == "code"):
        where = f"the cell that begins with {_first_line(cell.source)!r}"
        if cell.source.strip() and cell.execution_count is None:
            found.append(f"{where} was not run")
        for output in cell.outputs:
            said = _said(output)
            if output.output_type == "error":
                found.append(f"{where} ended with {output.ename}: {_plain(output.evalue)}")
            if local := LOCAL.search(said):
                found.append(f"{where} shows a path of this machine, {local[0]!r}")
            if stray := STRAY.search(said):
                at = stray.start()
                found.append(f"{where} shows a warning, {_first_line(said[at : at + 120])!r}")
    return found


def _said(output: NotebookNode) -> str:
    """Everything textual in one output."""
    data = output.get("data", {})
    texts = [text for kind, text in data.items() if kind.startswith("text/")]
    return "\n".join("".join(text) for text in [output.get("text", ""), *texts])


def normalise(notebook: NotebookNode) -> NotebookNode:
    """Keep outputs, counts and ids; drop metadata that changes on every run, and local paths.

    A widget keeps its text only: its state lives in a kernel, and stored state breaks viewers.
    """
    try:
        from nbstripout import strip_output
    except ImportError:
        raise Refused("normalising needs nbstripout: pip install -e '.[dev]'") from None
    notebook = strip_output(
        notebook, keep_output=True, keep_count=True, keep_id=True, extra_keys=list(DROPPED)
    )
    notebook.metadata["kernelspec"] = dict(KERNEL)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.cells = [
        cell for cell in notebook.cells
        if "injected-parameters" not in cell.metadata.get("tags", [])
    ]  # fmt: skip
    for cell in notebook.cells:
        if cell.metadata.get("tags") == []:
            del cell.metadata["tags"]
        for output in cell.get("outputs", []):
            _without_paths(output)
    return notebook


def _without_paths(output: NotebookNode) -> None:
    """Replace this machine's folders in an output by names that mean the same elsewhere."""
    bundle = output.get("data", {})
    bundle.pop(WIDGET, None)
    for kind in [kind for kind in bundle if kind.startswith("text/")]:
        bundle[kind] = _anonymous(bundle[kind])
    if "text" in output:
        output["text"] = _anonymous(output["text"])


def _anonymous(text: str) -> str:
    text = re.sub(r"/\S*?/ipykernel_\d+/\d+\.py", "<cell>", text)
    text = re.sub(r"/\S*?/site-packages/", "site-packages/", text)
    for folder, name in ((ROOT, "."), (Path(sys.prefix), "<venv>"), (Path.home(), "~")):
        text = text.replace(f"{folder}/", f"{name}/").replace("././", "./")
    return text


def _untyped(entry: Mapping[str, Any]) -> bool:
    return entry["inferred_type_name"] in ("None", None, "")


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text).strip()


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _running(path: Path) -> str:
    """Which cell an aborted notebook had reached, from what papermill saved last."""
    if not path.exists():
        return ""
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    status = [cell.metadata.get("papermill", {}).get("status") for cell in cells]
    at = status.index("running") if "running" in status else None
    return (
        ""
        if at is None
        else f", cell {at + 1}, which begins with " + repr(_first_line(cells[at].source))
    )
