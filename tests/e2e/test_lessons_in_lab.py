"""Lessons as a learner runs them: JupyterLab in Chromium, Run All, then look at every cell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from . import jupyter

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs the extra e2e: pip install -e '.[e2e]'"
)
if jupyter.chromium() is None:
    pytest.skip("needs Chromium: apt-get install chromium", allow_module_level=True)

LESSONS = sorted(path.stem for path in (jupyter.ROOT / "notebooks").glob("*.ipynb"))
QUICK = [name for name in LESSONS if name[:2] in ("00", "04", "07")]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[jupyter.Server]:
    """One JupyterLab for the module, with the lessons at their small test sizes."""
    with jupyter.server(tmp_path_factory.mktemp("lab")) as found:
        for name in LESSONS:
            _make_small(found.root / "notebooks" / f"{name}.ipynb")
        yield found


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=jupyter.chromium(), args=jupyter.FLAGS, headless=True
        )
        yield browser.new_page(viewport={"width": 1200, "height": 1600})
        browser.close()


def _make_small(path: Path) -> None:
    """Put the test sizes after the parameters, and remove outputs, so that none is stale."""
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if "parameters" in cell.metadata.get("tags", []):
            mock = cell.metadata.get("nbmake", {}).get("mock", {})
            cell.source += "".join(f"\n{name} = {value!r}" for name, value in mock.items())
    nbformat.write(notebook, path)


def _look(page: Any, lab: jupyter.Server, name: str) -> None:
    jupyter.open_notebook(page, lab, f"notebooks/{name}.ipynb")
    jupyter.run_all(page, timeout_s=240)
    found = jupyter.cells(page)
    assert [cell["count"] for cell in found if cell["source"].strip()] == list(
        range(1, 1 + sum(bool(cell["source"].strip()) for cell in found))
    )
    outputs = [output for cell in found for output in cell["outputs"]]
    errors = [output for output in outputs if output["output_type"] == "error"]
    assert not errors, errors[0]["evalue"]
    noise = [o["text"] for o in outputs if o.get("name") == "stderr" and "Warning" in o["text"]]
    assert not noise, noise[0]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert pictures, "no figure in the lesson"


@pytest.mark.notebook
@pytest.mark.timeout(420)
@pytest.mark.parametrize("name", QUICK)
def test_a_lesson_runs_in_the_browser_without_error_or_stray_warning(
    name: str, lab: jupyter.Server, page: Any
) -> None:
    _look(page, lab, name)


@pytest.mark.soak
@pytest.mark.timeout(420)
@pytest.mark.parametrize("name", [name for name in LESSONS if name not in QUICK])
def test_every_other_lesson_runs_in_the_browser_too(
    name: str, lab: jupyter.Server, page: Any
) -> None:
    _look(page, lab, name)
