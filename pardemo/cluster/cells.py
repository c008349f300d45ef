"""Run a notebook's cells in this very process, for the rank that drives a world.

papermill would start a kernel, which is no rank of torchrun's. What cells print goes to the
terminal as well as into the notebook.
"""

from __future__ import annotations

import os
import sys
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

import nbformat
from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from nbformat import NotebookNode, v4
from traitlets.config import Config

from pardemo import notebooks, scratch
from pardemo.parameters import validate


def execute(path: Path, output: Path, given: Mapping[str, Any]) -> NotebookNode:
    """Run a notebook in its own folder with checked parameters; as notebooks.execute does.

    `output` receives it after every cell. Raises Refused before anything runs when a parameter
    does not fit, NotebookFailed when a cell fails.
    """
    values = validate(given, notebooks.parameters(path), path.name)
    notebook, output = notebooks.read(path), output.resolve()
    _inject(notebook, values)
    with ExitStack() as stack:
        shell = stack.enter_context(_shell())
        stack.enter_context(chdir(path.parent))
        for count, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), 1):
            cell.outputs, cell.execution_count = [], count
            error = _run(shell, cell)
            nbformat.write(notebook, output)
            if error is not None:
                first = next(line for line in cell.source.splitlines() if line.strip())
                raise notebooks.NotebookFailed(
                    f"{path.name}, cell {count}: {type(error).__name__}: {error}; "
                    f"the cell begins with {first.strip()!r}"
                ) from error
    return notebook


def _inject(notebook: NotebookNode, values: Mapping[str, Any]) -> None:
    """Put the given values into a cell of their own, after the notebook's."""
    tagged = [i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", [])]
    if values and tagged:
        source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
        cell = v4.new_code_cell(source, metadata={"tags": ["injected-parameters"]})
        notebook.cells.insert(tagged[0] + 1, cell)


def _run(shell: Any, cell: NotebookNode) -> BaseException | None:
    """Run one cell; its outputs are put into it as they come."""
    shell.display_pub.into = shell.displayhook.into = cell.outputs
    out, err = (_Tee(name, getattr(sys, name), cell.outputs) for name in ("stdout", "stderr"))
    with redirect_stdout(out), redirect_stderr(err):  # type: ignore[type-var]
        result = shell.run_cell(cell.source, store_history=True)
    return result.error_before_exec or result.error_in_exec


class _Tee:
    """A stream that also ends up in a cell's outputs, consecutive texts as one."""

    def __init__(self, name: str, stream: TextIO, into: list[NotebookNode]) -> None:
        self.name, self.stream, self.into = name, stream, into

    def write(self, text: str) -> int:
        """To both."""
        last = self.into[-1] if self.into else None
        if last is not None and last.output_type == "stream" and last.name == self.name:
            last.text += text
        elif text:
            self.into.append(v4.new_output("stream", name=self.name, text=text))
        self.stream.write(text)
        self.stream.flush()
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _text(data: Mapping[str, Any]) -> dict[str, Any]:
    """What was displayed, with images as base64: a notebook is JSON."""
    return {
        kind: b64encode(value).decode() if isinstance(value, bytes) else value
        for kind, value in data.items()
    }


class _Publisher(DisplayPublisher):
    """display(): into the cell's outputs."""

    into: Any = None

    def publish(self, data: Any, metadata: Any = None, *_: Any, **__: Any) -> None:
        """Keep one thing that was displayed."""
        made = v4.new_output("display_data", data=_text(data), metadata=metadata or {})
        self.into.append(made)


class _Hook(DisplayHook):
    """The value of a cell's last line: into its outputs, and its text to the terminal."""

    into: Any = None

    def __call__(self, result: Any = None) -> None:
        """Keep one value, unless it is None or the line ends in a semicolon."""
        self.check_for_underscore()
        if result is None or self.quiet():
            return
        data, metadata = self.compute_format_data(result)
        self.update_user_ns(result)
        if data:
            made = v4.new_output("execute_result", _text(data))
            made.execution_count = self.prompt_count
            made.metadata = metadata
            self.into.append(made)
            sys.__stdout__.write(f"{data.get('text/plain', '')}\n")  # type: ignore[union-attr]


class _Shell(InteractiveShell):
    """IPython without a terminal or a kernel."""

    displayhook_class = _Hook
    display_pub_class = _Publisher


@contextmanager
def _shell() -> Iterator[Any]:
    """A fresh IPython of this process, which writes no history; cells are its `__main__`."""
    before = sys.modules["__main__"]
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "nocolor"
    with scratch.folder() as folder:
        os.environ.setdefault("IPYTHONDIR", str(folder))
        shell = _Shell.instance(config=config, ipython_dir=str(folder))
        try:
            yield shell
        finally:
            shell.reset(new_session=False)
            _Shell.clear_instance()
            sys.modules["__main__"] = before
