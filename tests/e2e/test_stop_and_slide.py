"""What a hand does in JupyterLab: press the stop button, move a slider."""

from __future__ import annotations

import time
from collections.abc import Iterator
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
    if dist.get_rank() == 0:
        dist.recv(torch.ones(1), 1)
    else:
        dist.recv(torch.ones(1), 0)

launch(wait_for_nobody, nprocs=2, timeout=600)
"""
STATUS = "() => jupyterapp.shell.currentWidget.sessionContext.session.kernel.status"


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


def _wait_idle(page: Any, timeout_s: float = 60) -> None:
    page.wait_for_function(f"({STATUS})() === 'idle'", timeout=timeout_s * 1000)


def _ranks(server: jupyter.Server) -> int:
    """The fork server and the ranks of this JupyterLab's kernels."""
    family = psutil.Process(server.pid).children(recursive=True)
    return sum("pardemo.launch.zygote" in " ".join(member.cmdline()) for member in family)


@pytest.mark.timeout(240)
def test_the_stop_button_ends_ranks_that_hang_and_the_next_cell_works(
    notebook: tuple[Any, jupyter.Server],
) -> None:
    page, server = notebook
    _run_cell(page, 0)
    deadline = time.monotonic() + 60
    while _ranks(server) < 3 and time.monotonic() < deadline:  # the fork server and two ranks
        time.sleep(0.2)
    time.sleep(2)
    page.get_by_role("button", name="Interrupt the kernel").first.click()
    _wait_idle(page, 20)
    outputs = jupyter.cells(page)[0]["outputs"]
    assert [o["ename"] for o in outputs if o["output_type"] == "error"] == ["KeyboardInterrupt"]
    assert _ranks(server) <= 1
    _run_cell(page, 1)
    _wait_idle(page)
    page.wait_for_timeout(500)
    assert jupyter.cells(page)[1]["outputs"][0]["data"]["text/plain"] == "1"


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
