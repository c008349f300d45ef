"""The explorers' page in a real browser: a slider moves, and the page says what Python says."""

from __future__ import annotations

from pathlib import Path

import pytest

from pardemo import explore

from . import jupyter

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs the extra e2e: pip install -e '.[e2e]'"
)
if jupyter.chromium() is None:
    pytest.skip("needs Chromium: apt-get install chromium", allow_module_level=True)


def test_moving_a_slider_on_the_page_shows_what_python_says(tmp_path: Path) -> None:
    (tmp_path / "explorers.html").write_text(explore.page())
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=jupyter.chromium(), args=jupyter.FLAGS, headless=True
        )
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: errors.append(request.url)
                if not request.url.startswith("file:") else None)  # fmt: skip
        page.goto(f"file://{tmp_path}/explorers.html")
        for name in explore.names():
            section = page.locator(f"#explorer-{name}")
            explorer = explore.get(name)
            said = section.locator(".said").inner_text()
            assert said == explorer.scene().said
            slider = section.get_by_role("slider").nth(0)
            control, allowed = next(iter(explorer.controls.items()))
            options = sorted(allowed) if not isinstance(allowed[0], str) else list(allowed)
            place = options.index(allowed[0])
            key, moved = ("ArrowLeft", place - 1) if place else ("ArrowRight", 1)
            slider.press(key)
            assert section.locator("output").nth(0).inner_text() == str(options[moved])
            expected = explorer.scene(**{control: options[moved]})
            assert section.locator(".said").inner_text() == expected.said
            assert section.locator("svg rect").count() >= len(expected.boxes)
        browser.close()
    assert not errors
