"""A scene: lanes of labelled boxes, and the sentence that says what they show.

Every explorer draws scenes, and a scene has three surfaces: a picture (`figure`), a widget in a
live kernel, and a page that works without one. All three show the same boxes and numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pardemo.plot import look
from pardemo.plot.style import STYLE

DARK = ("forward", "weight", "parameters", "compute", "collective", "mine", "whole")
KINDS = {"mine": "forward", "partial": "backward", "whole": "weight", "tied": "optimizer"}


@dataclass(frozen=True)
class Box:
    """From `start`, `width` long, in lane `lane`; `kind` gives its colour and hatch."""

    lane: int
    start: float
    width: float
    kind: str
    text: str = ""


@dataclass(frozen=True)
class Scene:
    """What one setting of an explorer shows. `numbers` are what `said` says, for tests."""

    lanes: tuple[str, ...]
    boxes: tuple[Box, ...]
    unit: str
    said: str
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def length(self) -> float:
        """Where the last box ends."""
        return max((box.start + box.width for box in self.boxes), default=1.0)

    @property
    def kinds(self) -> list[str]:
        """The kinds that appear, in order of appearance."""
        return list(dict.fromkeys(box.kind for box in self.boxes))

    def figure(self) -> Figure:
        """The scene as a picture; its caption is `said`."""
        with plt.style.context(STYLE):
            return self._draw()

    def _draw(self) -> Figure:
        size = (7.2, 0.95 + 0.36 * len(self.lanes))
        drawn, axes = plt.subplots(figsize=size, layout="constrained")
        for box in self.boxes:
            style = look(KINDS.get(box.kind, box.kind))
            axes.barh(
                box.lane, box.width, 0.86, left=box.start, color=style.colour,
                hatch=style.hatch, edgecolor="white", linewidth=0.6,
            )  # fmt: skip
            if box.text and box.width > 0.018 * self.length:
                colour = "white" if box.kind in DARK else "black"
                place = (box.start + box.width / 2, box.lane)
                axes.annotate(box.text, place, ha="center", va="center", fontsize=7, color=colour)
        axes.set_yticks(range(len(self.lanes)), self.lanes)
        axes.invert_yaxis()
        axes.set_xlim(0, self.length)
        axes.set_xlabel(self.unit)
        axes.grid(visible=False)
        handles = [_patch(kind) for kind in self.kinds]
        drawn.legend(handles=handles, loc="outside upper right", ncols=max(1, len(handles)))
        return drawn

    def compact(self) -> dict[str, Any]:
        """The scene as small JSON, for the page."""
        kinds = self.kinds
        boxes = [
            [b.lane, round(b.start, 4), round(b.width, 4), kinds.index(b.kind), b.text]
            for b in self.boxes
        ]
        return {
            "lanes": self.lanes,
            "kinds": kinds,
            "boxes": boxes,
            "unit": self.unit,
            "said": self.said,
        }


def _patch(kind: str) -> Patch:
    style = look(KINDS.get(kind, kind))
    return Patch(facecolor=style.colour, hatch=style.hatch, edgecolor="white", label=kind)


@dataclass(frozen=True)
class Explorer:
    """A title, controls with the values each may take, and the function that draws a scene.

    `draw(**values)` may raise ValueError for a combination that cannot be; its text is shown.
    """

    name: str
    title: str
    question: str
    controls: Mapping[str, tuple[Any, ...]]
    draw: Callable[..., Scene]

    def settings(self) -> list[dict[str, Any]]:
        """Every combination of the controls' values."""
        return [
            dict(zip(self.controls, values, strict=True))
            for values in product(*self.controls.values())
        ]

    def scene(self, **values: Any) -> Scene:
        """The scene for these values; the first value of each control where none is given."""
        unknown = set(values) - set(self.controls)
        if unknown:
            raise ValueError(
                f"{self.name} has no control {sorted(unknown)}; it has {list(self.controls)}"
            )
        chosen = {name: allowed[0] for name, allowed in self.controls.items()} | values
        try:
            return self.draw(**chosen)
        except ValueError as refusal:
            return Scene((), (), "", str(refusal))
