"""What a hand does in JupyterLab: press the stop button, move a slider."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import nbformat
import psutil
import pytest

from pardemo import explore

from . import jupyter

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs the extra e2e: pip install -e '.[e2e]'"
)
if jupyter.chromium() is None:
    pytest.skip("needs Chromium: apt-get install chromium", allow_module_level=True)

STUCK = """
import torch, torch.distributed as dist
from pardemo import launch

def wait_for_nobody():
    print("rank", dist.get_rank(), "waits")
    if dist.get_rank() == 0:
        dist.recv(torch.ones(1), 1)
    else:
        dist.recv(torch.ones(1), 0)

launch(wait_for_nobody, nprocs=2, timeout=600)
"""
_DEADLINE_S = 60.0


@pytest.fixture
def notebook(tmp_path: Any) -> Iterator[tuple[Any, jupyter.Server]]:
    """A notebook with a launch that hangs and an explorer, open in JupyterLab in Chromium."""
    with jupyter.server(tmp_path) as found:
        made = nbformat.v4.new_notebook()
        slider = "from pardemo import explore\nexplore.live('ring')"
        again = "launch(lambda: dist.get_rank(), nprocs=2)[1]"
        made.cells = [nbformat.v4.new_code_cell(code) for code in (STUCK, again, slider)]
        made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
        nbformat.write(made, tmp_path / "hands.ipynb")
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(
                executable_path=jupyter.chromium(), args=jupyter.FLAGS, headless=True
            )
            page = browser.new_page(viewport={"width": 1200, "height": 1400})
            jupyter.open_notebook(page, found, "hands.ipynb")
            yield page, found
            browser.close()


def _run_cell(page: Any, index: int) -> None:
    page.evaluate(
        """index => { const notebook = jupyterapp.shell.currentWidget.content;
           notebook.activeCellIndex = index; notebook.deselectAll();
           jupyterapp.commands.execute('notebook:run-cell'); }""",
        index,
    )


def _wait_until(page: Any, happened: Callable[[], bool], what: str) -> None:
    """Wait for an outcome; the page goes on meanwhile. Its kernel status may lag behind."""
    deadline = time.monotonic() + _DEADLINE_S
    while not happened():
        assert time.monotonic() < deadline, f"not within {_DEADLINE_S:g} s: {what}"
        page.wait_for_timeout(200)


def _outputs(page: Any, index: int, kind: str) -> list[dict[str, Any]]:
    """A cell's outputs of one type, from the notebook's model."""
    return [o for o in jupyter.cells(page)[index]["outputs"] if o["output_type"] == kind]


def _ranks(server: jupyter.Server) -> int:
    """The fork server and the ranks of this JupyterLab's kernels."""
    found = 0
    for member in psutil.Process(server.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may end while we look
            found += "pardemo.launch.zygote" in " ".join(member.cmdline())
    return found


@pytest.mark.timeout(300)
def test_the_stop_button_ends_ranks_that_hang_and_the_next_cell_works(
    notebook: tuple[Any, jupyter.Server],
) -> None:
    page, server = notebook
    _run_cell(page, 0)
    said = "".join  # the cell's text, in as many outputs as it came in
    _wait_until(
        page,
        lambda: said(o["text"] for o in _outputs(page, 0, "stream")).count("waits") == 2,
        "both ranks say that they wait",
    )
    assert _ranks(server) == 3  # the fork server and two ranks
    page.get_by_role("button", name="Interrupt the kernel").first.click()
    _wait_until(page, lambda: bool(_outputs(page, 0, "error")), "the cell ends with an error")
    assert [o["ename"] for o in _outputs(page, 0, "error")] == ["KeyboardInterrupt"]
    _wait_until(page, lambda: _ranks(server) <= 1, "the ranks are gone")
    # what Jupyter gets before it has answered a cell that failed, it drops ("aborted")
    _wait_until(page, lambda: jupyter.cells(page)[0]["count"] is not None, "its reply")
    page.wait_for_timeout(1000)
    _run_cell(page, 1)
    _wait_until(page, lambda: bool(jupyter.cells(page)[1]["outputs"]), "the next cell's value")
    assert [o.get("data", o) for o in jupyter.cells(page)[1]["outputs"]] == [{"text/plain": "1"}]


@pytest.mark.timeout(240)
def test_moving_a_slider_in_jupyterlab_changes_the_picture(
    notebook: tuple[Any, jupyter.Server],
) -> None:
    page, _ = notebook
    _run_cell(page, 2)
    page.get_by_text(explore.scene("ring", step=0).said).wait_for(timeout=60_000)
    slider = page.get_by_role("slider").nth(1)
    slider.focus()
    for _ in range(3):
        slider.press("ArrowRight")
    page.get_by_text(explore.scene("ring", step=3).said).wait_for(timeout=60_000)
