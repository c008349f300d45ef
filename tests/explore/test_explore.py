"""Explorers: the numbers are the package's own, and picture, widget and page show the same."""

from __future__ import annotations

import html
import json
import re
from typing import Any

import ipywidgets as widgets
import pytest
from matplotlib.colors import to_rgb

from pardemo import explore, predict
from pardemo.cluster.slider import Slider
from pardemo.explore import buckets
from pardemo.explore.ring import held
from pardemo.explore.scene import ink, look_of


@pytest.mark.parametrize("name", explore.names())
def test_every_setting_draws_or_says_why_not(name: str) -> None:
    explorer = explore.get(name)
    settings = explorer.settings()
    assert len(settings) >= 20
    for values in settings[:: max(1, len(settings) // 20)]:
        scene = explorer.scene(**values)
        assert len(scene.said) > 20
        assert bool(scene.lanes) == bool(scene.boxes)
        assert all(0 <= box.lane < len(scene.lanes) and box.width >= 0 for box in scene.boxes)


def test_the_bubble_of_the_explorer_is_the_closed_form() -> None:
    scene = explore.scene("pipeline", schedule_name="gpipe", stages=4, microbatches=8, virtual=1)
    assert scene.numbers["bubble"] == pytest.approx(3 / 11)
    assert "27.3%" in scene.said


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_the_ring_ends_with_every_chunk_whole_and_not_one_step_earlier(ranks: int) -> None:
    steps = 2 * (ranks - 1)
    whole = [
        all(c == set(range(ranks)) for r in held(ranks, s) for c in r) for s in range(steps + 1)
    ]
    assert whole == [False] * steps + [True]
    sent = explore.scene("ring", ranks=ranks, step=steps).numbers["sent"]
    assert sent == pytest.approx(predict.wire_factor("all_reduce", ranks))


def test_zero_memory_is_what_predict_says() -> None:
    scene = explore.scene("zero", billions=7, ranks=64, precision="bf16 + fp32 master")
    assert scene.numbers["ddp"] == pytest.approx(112)
    assert scene.numbers["zero3"] == pytest.approx(112 / 64)


def test_one_huge_bucket_hides_nothing_and_tiny_ones_pay_for_every_message() -> None:
    huge = explore.scene("buckets", bucket_mb=336, ranks=8)
    split = explore.scene("buckets", bucket_mb=28, ranks=8)
    assert huge.numbers["buckets"] == 1
    assert split.numbers["exposed_s"] < huge.numbers["exposed_s"] / 3
    slow = [
        explore.scene("buckets", bucket_mb=mb, latency_us=500).numbers["step_s"]
        for mb in (7, 56, 336)
    ]
    assert min(slow) == slow[1], "with a costly message the best size is neither end"


@pytest.mark.parametrize("megabytes", [1, 7, 28, 30, 56, 112, 336, 1000])
def test_buckets_hold_every_gradient_once(megabytes: int) -> None:
    assert sum(buckets.buckets(megabytes * 1e6)) == buckets.LAYERS * buckets.PIECES


def test_an_unknown_explorer_or_control_names_the_right_ones() -> None:
    with pytest.raises(ValueError, match="did you mean 'pipeline'"):
        explore.get("pipelin")
    with pytest.raises(ValueError, match="no control"):
        explore.scene("ring", rank=3)


def test_the_picture_has_a_box_for_every_box_of_the_scene() -> None:
    scene = explore.scene("pipeline", schedule_name="1f1b", stages=2, microbatches=4)
    drawn = scene.figure()
    assert len(drawn.axes[0].patches) == len(scene.boxes) == 2 * 2 * 4
    assert drawn.alt == scene.said, "what the picture shows is said as text too"


def test_every_box_has_text_that_can_be_read_on_its_colour() -> None:
    """Black or white, at least 4.5 to 1: what WCAG asks of small text."""
    for name in explore.names():
        for kind in explore.scene(name).kinds:
            light, dark = sorted(
                (_luminance(ink(kind)), _luminance(look_of(kind).colour)), reverse=True
            )
            assert (light + 0.05) / (dark + 0.05) >= 4.5, kind


def _luminance(colour: Any) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_what_a_scene_assumes_is_said_beside_what_it_claims() -> None:
    for name in explore.names():
        scene = explore.scene(name)
        assert scene.assumes.endswith(".")
        assert scene.assumes in explore.fragment(name).replace("&#x27;", "'")


def test_moving_a_slider_changes_the_live_picture() -> None:
    live = explore.live("ring")
    seen = [live.picture.value]
    for name in ("step", "ranks"):
        live.controls[name].value = 3
        seen.append(live.picture.value)
    assert len(set(seen)) == 3
    said = explore.scene("ring", ranks=3, step=3).said
    assert f"<b>{html.escape(said)}</b>" in seen[-1]
    assert re.search(r'<img [^>]*alt="[^"]{20,}" src="data:image/png;base64,iVBOR', seen[-1])


def test_no_widget_is_an_output_widget_which_can_hang_a_notebook_client() -> None:
    """Seen to fail with interactive_output, which hung one papermill run in eight."""
    live = [explore.live(name) for name in explore.names()]
    live.append(Slider(["100mbit", "1gbit"], print))
    for widget in live:
        kinds = {type(child) for child in widget.children}
        assert kinds <= {widgets.SelectionSlider, widgets.HTML}


def test_what_a_function_prints_appears_below_the_slider_of_rates() -> None:
    slider = Slider(["100mbit", "1gbit"], lambda rate: print(f"<{rate}> chosen"))
    assert slider.shown.value == "<pre>&lt;100mbit&gt; chosen\n</pre>"
    slider.rate.value = "1gbit"
    assert slider.shown.value == "<pre>&lt;1gbit&gt; chosen\n</pre>"


def test_the_page_is_self_contained_and_holds_the_scenes_of_python() -> None:
    page = explore.page()
    addresses = set(re.findall(r"https?://[^\s'\"<]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    piece = explore.fragment("ring")
    data = json.loads(re.search(r'json">(.*?)</script>', piece, re.S).group(1))  # type: ignore[union-attr]
    assert data["scenes"]["[4, 3]"]["said"] == explore.scene("ring", ranks=4, step=3).said
    assert len(piece) < 200_000


def test_the_stored_output_of_sliders_says_what_to_do_for_a_reader_without_a_kernel() -> None:
    said = repr(explore.live("buckets"))
    assert said.startswith("DDP: buckets and overlap: run this cell in a live kernel for sliders")
    assert "link gb per s" in said
