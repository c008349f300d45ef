"""Lanes: what each rank was doing when, in seconds (lanes) or in ticks of a schedule (schedule)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from .style import durations, field, figure, label_rows, lift_title, look

KINDS = ("forward", "backward", "weight", "collective", "transfer", "optimizer", "idle")
SHORT = {"f": "forward", "b": "backward", "w": "weight", "F": "forward", "B": "backward",
         "W": "weight"}  # fmt: skip
NARROW = 12.0  # ticks beyond which the microbatch numbers no longer fit a cell of 7 inches / this

DARK = ("forward",)  # kinds whose colour asks for white text


@figure
def lanes(axes: Axes, spans: Iterable[Any], title: str = "") -> str:
    """A lane per rank: forward, backward, each collective or transfer, optimizer, idle.

    Spans (objects or mappings): rank, kind, start_s, end_s; optional name. The grey ground of a
    lane is idle time: nothing recorded.
    """
    spans = list(spans)
    begin = min((_start(span) for span in spans), default=0.0)
    length = max((_end(span) for span in spans), default=1.0) - begin
    scale, unit = durations([length])
    ranks = sorted({int(field(span, "rank", default=0)) for span in spans})
    for rank in ranks:
        axes.barh(rank, length * scale, 0.82, color=look("idle").colour, linewidth=0)
    for span in spans:
        kind = _kind(span)
        style, lane = look(kind), int(field(span, "rank", default=0))
        height, lift = (0.34, 0.22) if kind in ("collective", "transfer") else (0.8, 0.0)
        axes.barh(lane + lift, (_end(span) - _start(span)) * scale, height,
                  left=(_start(span) - begin) * scale, color=style.colour, hatch=style.hatch,
                  edgecolor="white", linewidth=0.4)  # fmt: skip
    axes.set_title(title)
    _finish(axes, ranks, "rank", {_kind(span) for span in spans} | {"idle"})
    axes.set_xlabel(f"time [{unit}]")
    busy = {
        rank: sum(_end(s) - _start(s) for s in spans
                  if field(s, "rank", default=0) == rank
                  and _kind(s) not in ("collective", "transfer", "idle"))
        for rank in ranks
    }  # fmt: skip
    said = ", ".join(
        f"rank {rank} computes {t / length:.0%} of the time" for rank, t in busy.items()
    )
    return f"Time line of {len(ranks)} ranks over {length * scale:.3g} {unit}: {said}."


@figure
def schedule(axes: Axes, spans: Any, title: str = "") -> str:
    """The ticks of a pipeline: a row per stage, a cell per forward or backward of a microbatch.

    Spans (or an object with `.spans`): stage (or rank), kind ("forward", "backward", "weight"),
    microbatch, start and end in ticks. White is the bubble. Where a rank has several stages (an
    object with `.chunks`), a row is a rank: a rank that works on one of its stages does not wait.
    """
    row = "rank" if getattr(spans, "chunks", 1) > 1 else "stage"
    spans = list(getattr(spans, "spans", spans))
    rows = sorted({_row(span, row) for span in spans})
    length = max((_end(span) for span in spans), default=1.0)
    for span in spans:
        style, start, width = look(_kind(span)), _start(span), _end(span) - _start(span)
        axes.barh(_row(span, row), width, 0.9, left=start, color=style.colour, edgecolor="white")
        number = field(span, "microbatch")
        if number is not None and length / max(width, 1e-9) <= 6 * NARROW:
            axes.text(start + width / 2, _row(span, row), f"{number}", ha="center", va="center",
                      fontsize=7.5, color="white" if _kind(span) in DARK else "black")  # fmt: skip
    axes.set_title(title)
    _finish(axes, rows, row, {_kind(span) for span in spans}, hatched=False)
    axes.set_xlim(0, length)
    axes.set_xlabel("ticks (white: bubble)")
    busy = sum(_end(span) - _start(span) for span in spans)
    bubble = 1 - busy / (length * max(len(rows), 1))
    return f"Schedule of {len(rows)} {row}s over {length:g} ticks; bubble {bubble:.1%}."


def _finish(axes: Axes, rows: list[int], word: str, kinds: set[str], hatched: bool = True) -> None:
    label_rows(axes, [f"{word} {row}" for row in rows], rows)
    axes.grid(visible=False)
    known = [kind for kind in KINDS if kind in kinds] + sorted(kinds - set(KINDS))
    handles = [
        Patch(
            facecolor=look(kind).colour,
            hatch=look(kind).hatch * hatched,
            edgecolor="white",
            label=kind,
        )
        for kind in known
    ]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(handles))
    lift_title(axes)


def _row(span: Any, row: str) -> int:
    return int(field(span, row, "rank", default=0))


def _kind(span: Any) -> str:
    kind = str(field(span, "kind", "phase", "name", default="compute"))
    return SHORT.get(kind, kind)


def _start(span: Any) -> float:
    return float(field(span, "start_s", "start", "begin", default=0.0))


def _end(span: Any) -> float:
    return float(field(span, "end_s", "end", "stop", default=_start(span)))
