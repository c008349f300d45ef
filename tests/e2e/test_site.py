"""The static site in a real browser: its links, its explorers, and what axe says of it."""

from __future__ import annotations

import re
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
    assert [path.name for path in wanted if not path.exists()] == []
    for path in pages(site):
        page.goto(f"file://{path}")
        links = page.eval_on_selector_all("main a[href]", "nodes => nodes.map(n => n.href)")
        for link in links:
            parts = urlsplit(link)
            if parts.scheme == "file":
                target = Path(unquote(parts.path))
                assert target.exists(), f"{path.name} links to {link}"
                if parts.fragment and target.suffix == ".html":
                    named = f'id="{unquote(parts.fragment)}"'
                    assert named in target.read_text(), f"{path.name} links to {link}"


def test_the_explorers_of_the_site_answer_to_their_sliders(site: Path, browser: Any) -> None:
    page = browser.new_page()
    page.goto(f"file://{site}/explorers.html")
    section = page.locator("[data-explorer=ring]")
    slider = section.get_by_role("slider", name="step")
    slider.focus()
    for _ in range(3):
        slider.press("ArrowRight")
    assert section.locator(".said").inner_text() == explore.scene("ring", step=3).said


def pages(site: Path) -> list[Path]:
    """Every page that is ours; the theme makes `search` and `genindex` itself."""
    found = [p for p in sorted(site.rglob("*.html")) if "_static" not in p.parts]
    return [p for p in found if p.stem not in ("search", "genindex")]


def test_no_page_loads_anything_from_elsewhere_and_formulas_are_drawn(
    site: Path, browser: Any
) -> None:
    """Requests are counted, not looked for in the source: scripts, styles, fonts, pictures."""
    page, asked = browser.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    formulas = 0
    for path in pages(site):
        page.goto(f"file://{path}", wait_until="load")
        text = page.locator("main").inner_text()
        assert not re.search(r"\\frac|\\mathrm|\\text\{", text), f"raw TeX on {path.name}"
        formulas += page.locator("main math").count()
    assert formulas > 20
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def test_no_page_reports_a_script_error(site: Path, browser: Any) -> None:
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    for path in pages(site):
        page.goto(f"file://{path}")
    assert errors == []


def _axe(browser: Any, theme: str, paths: list[Path]) -> list[tuple[str, str, str]]:
    """Serious faults that axe finds on these pages in a theme: page, rule, first element."""
    page, serious = browser.new_page(color_scheme=theme), []
    for path in paths:
        page.goto(f"file://{path}")
        page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
        found = axe.Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa"]})
        serious += [
            (path.stem, fault["id"], fault["nodes"][0]["html"][:160])
            for fault in found.response["violations"]
            if fault["impact"] in ("serious", "critical")
        ]
    return serious


THEMES = pytest.mark.parametrize("theme", ["light", "dark"])


@THEMES
def test_axe_finds_no_serious_fault_in_labels_or_contrast(
    theme: str, site: Path, browser: Any
) -> None:
    names = ("explorers", "index", "notebooks/00_start_here")
    assert _axe(browser, theme, [site / f"{name}.html" for name in names]) == []


@pytest.mark.soak
@THEMES
def test_axe_finds_no_serious_fault_on_any_page(theme: str, site: Path, browser: Any) -> None:
    assert _axe(browser, theme, pages(site)) == []
