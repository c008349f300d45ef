"""Figures: what they say, how they are told apart without colour, and that they start at zero."""

from __future__ import annotations

import io

import matplotlib
import matplotlib.colors
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pardemo import plot, predict
from pardemo.plot import style
from pardemo.plot.style import look

ROWS = [
    {"name": "single", "throughput": 100.0, "throughput_lo": 95.0, "throughput_hi": 104.0},
    {"name": "ddp", "throughput": 150.0, "throughput_predicted": 160.0, "status": "noisy"},
    {"name": "expert", "throughput": None},
]
STEP = {"compute_s": 0.03, "exposed_s": 0.01, "idle_s": 0.002, "rest_s": -0.001}
SPANS = [
    {"rank": 0, "kind": "forward", "start_s": 0.0, "end_s": 0.5},
    {"rank": 1, "kind": "collective", "start_s": 0.5, "end_s": 1.0},
]
TICKS = [
    {"stage": s, "kind": "forward", "microbatch": m, "start": s + m, "end": s + m + 1}
    for s in range(3)
    for m in range(4)
]
LONG = "one step of a pipeline, with a title that is as long as the whole figure is wide"
FIGURES = {
    "throughput": lambda: plot.throughput(ROWS),
    "anatomy": lambda: plot.anatomy({"ddp": STEP}),
    "bytes": lambda: plot.bytes({"ddp": 4e6, "fsdp": 6e6}, {"ddp": 4e6, "fsdp": 5e6}),
    "memory": lambda: plot.memory({"ddp": {"parameters_bytes": 4e6}}, {"ddp": 4e6}),
    "dots": lambda: plot.dots({"ddp": [0.1, 0.2, 0.3]}, {"ddp": 0.1}),
    "scaling": lambda: plot.scaling([{"name": "ddp", "ranks": 2, "speedup": 1.5}]),
    "curve": lambda: plot.curve([1e3, 1e6], [1e-3, 1e-2], model=lambda x: x * 1e-8 + 1e-3),
    "lanes": lambda: plot.lanes(SPANS),
    "schedule": lambda: plot.schedule(TICKS),
}


def bars(figure: Figure) -> list[Rectangle]:
    return [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_a_png_that_carries_its_alt_text(name: str) -> None:
    figure = FIGURES[name]()
    data, metadata = figure._repr_mimebundle_()
    assert data["image/png"].startswith(b"\x89PNG")
    assert metadata["image/png"]["alt"] == figure.alt == repr(figure)
    assert len(figure.alt) > 20
    assert figure.alt.encode() in data["image/png"]


@pytest.mark.parametrize("name", ["throughput", "bytes", "memory", "dots", "scaling"])
def test_amounts_start_at_zero(name: str) -> None:
    axes = FIGURES[name]().axes[0]
    low = axes.get_ylim()[0] if name in ("dots", "scaling") else axes.get_xlim()[0]
    assert low == 0


def test_throughput_leaves_out_what_was_not_measured_and_pales_what_is_not_sound() -> None:
    figure = plot.throughput(ROWS)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["single", "ddp"]
    assert [bar.get_alpha() for bar in bars(figure)] == [1.0, 0.45]
    assert "ddp 150 (noisy)" in figure.alt


def test_the_parts_of_a_step_add_up_and_a_negative_rest_is_shown_left_of_zero() -> None:
    figure = plot.anatomy({"ddp": STEP})
    widths = [bar.get_width() for bar in bars(figure)]
    assert sum(widths) == pytest.approx(41.0)
    assert bars(figure)[-1].get_x() == 0
    assert widths[-1] == pytest.approx(-1.0)


def test_counted_bytes_that_equal_the_formula_are_called_equal() -> None:
    alt = FIGURES["bytes"]().alt
    assert "ddp 4, equal" in alt
    assert "fsdp 6, formula 5" in alt


def test_a_prediction_is_a_line_and_its_error_is_said() -> None:
    assert "ddp 200 ms (predicted 100 ms, -50%)" in FIGURES["dots"]().alt


def test_oversubscribed_points_are_hollow_and_unconnected() -> None:
    rows = [
        {"name": "ddp", "ranks": n, "speedup": s, "oversubscribed": n > 2}
        for n, s in ((1, 1.0), (2, 1.6), (4, 1.1))
    ]
    lines = plot.scaling(rows).axes[0].lines
    assert [len(line.get_xdata()) for line in lines if line.get_color() == look("ddp").colour] == [
        2,
        1,
    ]
    assert lines[-1].get_fillstyle() == "none"


def test_the_bubble_of_a_drawn_schedule_is_counted() -> None:
    assert "3 stages over 6 ticks; bubble 33.3%" in plot.schedule(TICKS).alt


def test_a_strategy_has_the_same_look_everywhere_and_none_share_one() -> None:
    assert look("ddp") == look("ddp, 4 buckets")
    names = ["single", "data_parallel", "ddp", "model_parallel", "pipeline", "tensor", "zero1"]
    names += ["fsdp", "context", "expert"]
    assert len({look(name) for name in names}) == len(names)
    assert len({look(name).marker for name in names}) == len(names)
    assert look("mine") == look("mine")


def test_colours_of_a_step_differ_in_grey_or_in_hatch() -> None:
    def grey(name: str) -> float:
        return float(np.dot(matplotlib.colors.to_rgb(look(name).colour), (0.299, 0.587, 0.114)))

    parts = ["compute", "exposed", "idle", "rest"]
    pairs = [(a, b) for a in parts for b in parts if a < b]
    assert all(
        abs(grey(a) - grey(b)) > 0.1 or look(a).hatch != look(b).hatch for a, b in pairs
    )  # fmt: skip


def test_drawing_leaves_the_readers_own_style_alone() -> None:
    before = dict(matplotlib.rcParams)
    FIGURES["dots"]()
    assert dict(matplotlib.rcParams) == before


def test_panels_hold_several_drawings_in_one_figure() -> None:
    figure, axes = plot.panels(1, 2)
    plot.dots({"a": [1.0]}, axes=axes[0])
    plot.anatomy({"ddp": STEP}, axes=axes[1])
    assert len(figure.axes) == 2
    figure.savefig(io.BytesIO(), format="png")


def test_a_caption_outside_a_notebook_is_its_text() -> None:
    assert plot.caption("DDP is slower.", "2 ranks.") == "DDP is slower. 2 ranks."


def test_a_caption_in_a_notebook_shows_the_figure_first_and_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import IPython.display

    shown: list[object] = []
    monkeypatch.setattr(style, "in_notebook", lambda: True)
    monkeypatch.setattr(
        IPython.display, "display", lambda value, raw=False: (shown.append(value), mark(value))
    )
    figure = plot.dots({"ddp": [1.0, 2.0]})
    plot.caption("First.", "Then.")
    plot.caption("Second.")
    assert shown[0] is figure
    assert [part["text/markdown"] for part in shown[1:]] == ["**First.** Then.", "**Second.**"]


def mark(value: object) -> None:
    if isinstance(value, plot.Picture):
        value._repr_mimebundle_()


def test_a_rank_with_several_stages_is_one_row_and_the_bubble_is_that_of_ranks() -> None:
    found = predict.schedule("zbv", ranks=4, microbatches=8)
    assert plot.schedule(found).alt.endswith(f"4 ranks over 51 ticks; bubble {found.bubble:.1%}.")


def test_a_name_that_begins_like_a_part_of_a_step_is_not_drawn_like_it() -> None:
    drawn = {look(f"weight {value}") for value in (0.0, 0.01, 0.1)}
    assert len(drawn) == 3
    assert look("weight") not in drawn
    assert look("zero1 by hand") == look("zero1"), "a strategy keeps its colour everywhere"


@pytest.mark.parametrize("name", ["lanes", "schedule"])
def test_a_title_stands_above_the_legend_and_not_in_it(name: str) -> None:
    drawn = getattr(plot, name)(SPANS if name == "lanes" else TICKS, title=LONG)
    drawn.canvas.draw()
    (axes,) = drawn.axes
    legend = axes.get_legend()
    assert legend is not None
    assert axes._left_title.get_text() == LONG  # type: ignore[attr-defined]
    title = axes._left_title.get_window_extent()  # type: ignore[attr-defined]
    assert not title.overlaps(legend.get_window_extent())
