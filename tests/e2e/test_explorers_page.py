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
            section = page.locator(f"[data-explorer={name}]")
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
            assert section.locator("svg rect.box").count() == len(expected.boxes)
        browser.close()
    assert not errors


def test_explorers_share_a_page_with_each_other_and_with_other_things(tmp_path: Path) -> None:
    """Ids once each, no style outside, the same explorer twice, and each moved by the keyboard."""
    twice = explore.fragment("ring", 3) + explore.fragment("zero", 3) + explore.fragment("ring", 3)
    beside = '<label id="mine">a label</label><svg id="other" width="3" height="3"></svg>'
    (tmp_path / "page.html").write_text(f"<!doctype html><html><body>{beside}{twice}</body></html>")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=jupyter.chromium(), args=jupyter.FLAGS, headless=True
        )
        page = browser.new_page()
        page.goto(f"file://{tmp_path}/page.html")
        ids = page.eval_on_selector_all("[id]", "nodes => nodes.map(n => n.id)")
        assert len(ids) == len(set(ids)) > 3
        assert page.eval_on_selector("#mine", "n => getComputedStyle(n).display") == "inline"
        assert page.eval_on_selector("#other", "n => getComputedStyle(n).width") == "3px"
        first, _, last = page.locator(".pardemo-explorer").all()
        page.keyboard.press("Tab")  # the first control is the first stop of the keyboard
        page.keyboard.press("ArrowRight")
        moved = explore.scene("ring", ranks=6)
        assert first.locator(".said").inner_text() == moved.said
        assert first.get_by_role("slider").first.get_attribute("aria-valuetext") == "6"
        assert last.locator(".said").inner_text() == explore.scene("ring").said
        browser.close()


def test_the_page_follows_a_dark_theme(tmp_path: Path) -> None:
    (tmp_path / "explorers.html").write_text(explore.page())
    seen = {}
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=jupyter.chromium(), args=jupyter.FLAGS, headless=True
        )
        for scheme in ("light", "dark"):
            page = browser.new_page(color_scheme=scheme)
            page.goto(f"file://{tmp_path}/explorers.html")
            style = "n => [getComputedStyle(n).color, getComputedStyle(n).backgroundColor]"
            seen[scheme] = page.eval_on_selector(".pardemo-explorer", style)
            lane = "n => getComputedStyle(n).fill"
            assert page.eval_on_selector(".pardemo-explorer svg > text", lane) == seen[scheme][0]
        browser.close()
    assert seen["light"] != seen["dark"]
