"""The static site in a real browser: its links, its explorers, and what axe says of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from pardemo import explore

from . import jupyter

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs the extra e2e: pip install -e '.[e2e]'"
)
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the extra e2e")
pytest.importorskip("myst_nb", reason="needs the extra site: pip install -e '.[site]'")
if jupyter.chromium() is None:
    pytest.skip("needs Chromium: apt-get install chromium", allow_module_level=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pardemo.site import build

    return build(tmp_path_factory.mktemp("site")).parent


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(
            executable_path=jupyter.chromium(), args=jupyter.FLAGS, headless=True
        )
        yield running
        running.close()


def test_the_site_has_every_lesson_and_no_dead_link_between_its_pages(
    site: Path, browser: Any
) -> None:
    page = browser.new_page()
    lessons = sorted((jupyter.ROOT / "notebooks").glob("*.ipynb"))
    wanted = [site / "index.html", site / "explorers.html"]
    wanted += [site / "notebooks" / f"{lesson.stem}.html" for lesson in lessons]
    for path in wanted:
        assert path.exists(), path.name
        page.goto(f"file://{path}")
        links = page.eval_on_selector_all("main a[href]", "nodes => nodes.map(n => n.href)")
        for link in links:
            parts = urlsplit(link)
            if parts.scheme == "file":
                assert Path(unquote(parts.path)).exists(), f"{path.name} links to {link}"


def test_the_explorers_of_the_site_answer_to_their_sliders(site: Path, browser: Any) -> None:
    page = browser.new_page()
    page.goto(f"file://{site}/explorers.html")
    section = page.locator("#explorer-ring")
    slider = section.get_by_role("slider", name="step")
    slider.focus()
    for _ in range(3):
        slider.press("ArrowRight")
    assert section.locator(".said").inner_text() == explore.scene("ring", step=3).said


@pytest.mark.parametrize("name", ["explorers", "index", "notebooks/00_start_here"])
def test_axe_finds_no_serious_fault_in_labels_or_contrast(
    name: str, site: Path, browser: Any
) -> None:
    page = browser.new_page()
    page.goto(f"file://{site}/{name}.html")
    found = axe.Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa"]})
    serious = [
        (fault["id"], fault["nodes"][0]["html"][:160])
        for fault in found.response["violations"]
        if fault["impact"] in ("serious", "critical")
    ]
    assert not serious
