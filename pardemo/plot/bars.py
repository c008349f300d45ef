"""Bars: throughput per strategy, the anatomy of a step, bytes against their formula, memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from .style import BLACK, durations, field, figure, label_rows, lift_title, look, named, sizes

PARTS = (
    ("compute", "compute"),
    ("exposed", "exposed transfer"),
    ("idle", "idle"),
    ("rest", "rest"),
)
MEMORY = ("parameters", "gradients", "optimizer", "activations", "buffers")


@figure
def throughput(axes: Axes, table: Any, unit: str = "samples/s", title: str = "") -> str:
    """One bar per row, with its interval and the prediction as a line across it.

    Rows: name (or strategy), throughput; optional throughput_lo, throughput_hi,
    throughput_predicted, status. A row whose status is not "ok" is drawn pale.
    """
    said, rows = [], [(n, r) for n, r in named(table) if field(r, "throughput") is not None]
    reach = max((field(r, k, default=0.0) for _, r in rows
                 for k in ("throughput", "throughput_predicted")), default=1.0)  # fmt: skip
    for place, (name, row) in enumerate(rows):
        value, style = field(row, "throughput"), look(name)
        status = field(row, "status", default="ok")
        sound = status == "ok"
        axes.barh(place, value, color=style.colour, hatch=style.hatch, edgecolor="white")
        axes.patches[-1].set_alpha(1.0 if sound else 0.45)
        low, high = field(row, "throughput_lo"), field(row, "throughput_hi")
        if low is not None and high is not None:
            axes.plot([low, high], [place, place], color=BLACK, marker="|", linewidth=1.4)
        predicted = field(row, "throughput_predicted")
        if predicted is not None:
            axes.plot([predicted] * 2, [place - 0.45, place + 0.45], color=BLACK, linestyle=":")
        said.append(f"{name} {value:.3g}{'' if sound else ' (' + status + ')'}")
    label_rows(axes, [name for name, _ in rows])
    axes.set_xlim(0, 1.3 * reach)  # an interval without end must not squeeze the bars
    axes.set_xlabel(f"{unit} (bar: median; line: 95 % interval; dotted: predicted)")
    axes.set_title(title)
    return f"Throughput in {unit}: {', '.join(said)}."


@figure
def anatomy(axes: Axes, rows: Any, title: str = "") -> str:
    """Stacked bars of one step: compute, exposed transfer, idle, rest; each with its own hatch.

    Rows (or a mapping name -> row): compute_s, exposed_s, idle_s, rest_s. A negative part is
    measurement noise around zero; it is drawn to the left of zero, never hidden.
    """
    pairs = [(n, r) for n, r in named(rows) if field(r, "compute_s") is not None]
    scale, unit = durations(sum(_parts(row)) for _, row in pairs)
    said = []
    for place, (name, row) in enumerate(pairs):
        right = left = 0.0
        for (part, label), seconds in zip(PARTS, _parts(row), strict=True):
            style, width = look(part), seconds * scale
            start = right if width >= 0 else left
            shown = label if place == 0 else None
            axes.barh(place, width, left=start, color=style.colour, hatch=style.hatch,
                      edgecolor="white", label=shown)  # fmt: skip
            right, left = right + max(width, 0.0), left + min(width, 0.0)
        parts = ", ".join(
            f"{label} {seconds * scale:.3g}"
            for (_, label), seconds in zip(PARTS, _parts(row), strict=True)
        )
        said.append(f"{name}: {parts} {unit}")
    label_rows(axes, [name for name, _ in pairs])
    axes.axvline(0, color=BLACK, linewidth=0.8)
    axes.autoscale(axis="x")  # bars alone would end at the frame
    axes.use_sticky_edges = False
    axes.margins(x=0.02)
    axes.set_xlabel(f"one step [{unit}]")
    axes.set_title(title)
    _legend_above(axes, len(PARTS))
    return f"Anatomy of a step. {'; '.join(said)}."


@figure
def bytes(
    axes: Axes, measured: Mapping[str, float], predicted: Mapping[str, float], title: str = ""
) -> str:
    """Two bars per name: bytes counted from what ran, and bytes by the closed form."""
    scale, unit = sizes([*measured.values(), *(v for v in predicted.values() if v is not None)])
    said = []
    for place, (name, counted) in enumerate(measured.items()):
        style, formula = look(name), predicted.get(name)
        axes.barh(place - 0.2, counted / scale, 0.38, color=style.colour, hatch=style.hatch,
                  edgecolor="white", label="counted" if place == 0 else None)  # fmt: skip
        if formula is None:
            axes.annotate(" no formula", (counted / scale, place - 0.2), va="center", fontsize=9)
            said.append(f"{name} {counted / scale:.4g}, no formula")
            continue
        axes.barh(place + 0.2, formula / scale, 0.38, color="white", edgecolor=BLACK,
                  linewidth=1, label="by formula" if place == 0 else None)  # fmt: skip
        same = "equal" if counted == formula else f"formula {formula / scale:.4g}"
        axes.annotate(f" {same}", (max(counted, formula) / scale, place), va="center", fontsize=9)
        said.append(f"{name} {counted / scale:.4g}, {same}")
    label_rows(axes, list(measured))
    axes.set_xlim(left=0)
    axes.margins(x=0.18)
    axes.set_xlabel(f"sent per rank and step [{unit}] (filled: counted; outline: by formula)")
    axes.set_title(title)
    return f"Bytes sent per rank and step in {unit}: {'; '.join(said)}."


@figure
def memory(
    axes: Axes,
    stacks: Any,
    predicted: Mapping[str, float] | None = None,
    title: str = "",
    dotted: str = "by formula",
) -> str:
    """Stacked bars of one rank's memory; what a formula says as a dotted line (`dotted`: of what).

    `stacks`: name -> MemoryReport or mapping with parameters_bytes, gradients_bytes,
    optimizer_bytes, activations_bytes, buffers_bytes.
    """
    pairs, predicted = named(stacks), predicted or {}
    totals = [sum(_memory(row)) for _, row in pairs]
    scale, unit = sizes([*totals, *predicted.values()])
    for place, (name, row) in enumerate(pairs):
        left = 0.0
        for part, size in zip(MEMORY, _memory(row), strict=True):
            style = look(part)
            axes.barh(place, size / scale, left=left, color=style.colour, hatch=style.hatch,
                      edgecolor="white", label=part if place == 0 else None)  # fmt: skip
            left += size / scale
        if name in predicted:
            formula = predicted[name] / scale
            axes.plot([formula] * 2, [place - 0.45, place + 0.45], color=BLACK, linestyle=":")
    label_rows(axes, [name for name, _ in pairs])
    axes.set_xlabel(f"memory of one rank [{unit}]{f' (dotted: {dotted})' if predicted else ''}")
    axes.set_title(title)
    _legend_above(axes, len(MEMORY))
    said = (f"{n} {t / scale:.4g} {unit}" for (n, _), t in zip(pairs, totals, strict=True))
    return f"Memory per rank: {', '.join(said)}."


def _parts(row: Any) -> list[float]:
    return [float(field(row, f"{part}_s", default=0.0)) for part, _ in PARTS]


def _memory(row: Any) -> list[float]:
    return [float(field(row, f"{part}_bytes", part, default=0.0)) for part in MEMORY]


def _legend_above(axes: Axes, columns: int) -> None:
    handles = axes.get_legend_handles_labels()[0]
    if handles:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=columns)
        lift_title(axes)
