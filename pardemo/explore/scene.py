"""A scene: lanes of labelled boxes, and the sentence that says what they show.

Every explorer draws scenes, and a scene has three surfaces: a picture (`figure`), a widget in a
live kernel, and a page that works without one. All three show the same boxes and numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from pardemo.plot import look
from pardemo.plot.style import Look, Picture, figure

# kinds of box that are drawn as a kind of the house style is
KINDS = {"mine": "forward", "partial": "backward", "whole": "optimizer", "tied": "optimizer",
         "interval": "idle"}  # fmt: skip
NARROW = 0.018  # share of a lane's length below which a box has no room for its text


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
    """What one setting shows: `said` claims, `assumes` are its conditions, `numbers` for tests."""

    lanes: tuple[str, ...]
    boxes: tuple[Box, ...]
    unit: str
    said: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    assumes: str = ""

    @property
    def length(self) -> float:
        """Where the last box ends."""
        return max((box.start + box.width for box in self.boxes), default=1.0)

    @property
    def kinds(self) -> list[str]:
        """The kinds that appear, in order of appearance."""
        return list(dict.fromkeys(box.kind for box in self.boxes))

    def figure(self) -> Picture:
        """The scene as a picture; its alt text is `said`, its caption `said` and `assumes`."""
        return _draw(self, size=(7.2, 0.95 + 0.36 * len(self.lanes)))

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


@figure
def _draw(axes: Axes, scene: Scene) -> str:
    for box in scene.boxes:
        style = look_of(box.kind)
        axes.barh(
            box.lane, box.width, 0.86, left=box.start, color=style.colour,
            hatch=style.hatch, edgecolor="white", linewidth=0.6,
        )  # fmt: skip
        if box.text and box.width > NARROW * scene.length:
            _write(axes, box)
    axes.set_yticks(range(len(scene.lanes)), scene.lanes)
    axes.invert_yaxis()
    axes.set_xlim(0, scene.length)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=scene.length >= 2))
    axes.set_xlabel(scene.unit)
    axes.grid(visible=False)
    handles = [
        Patch(facecolor=style.colour, hatch=style.hatch, edgecolor="white", label=kind)
        for kind in scene.kinds
        for style in [look_of(kind)]
    ]
    axes.figure.legend(handles=handles, loc="outside upper right", ncols=max(1, len(handles)))
    return scene.said


def _write(axes: Axes, box: Box) -> None:
    """The text of a box on a patch of the box's own colour, so that no hatch runs through it."""
    ground = {"facecolor": look_of(box.kind).colour, "edgecolor": "none", "pad": 0.6}
    axes.text(
        box.start + box.width / 2, box.lane, box.text, ha="center", va="center", fontsize=7,
        color=ink(box.kind), bbox=ground,
    )  # fmt: skip


def look_of(kind: str) -> Look:
    """Colour and hatch of a kind of box."""
    return look(KINDS.get(kind, kind))


def ink(kind: str) -> str:
    """Black or white, whichever is easier to read on this kind's colour (WCAG's luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
              for c in to_rgb(look_of(kind).colour)]  # fmt: skip
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000000"


@dataclass(frozen=True)
class Explorer:
    """A title, controls with the values each may take, and the function that draws a scene.

    `draw(**values)` may raise ValueError for a combination that cannot be; its text is shown.
    `assumes` says what every scene takes for granted; it stands below each of them.
    """

    name: str
    title: str
    question: str
    controls: Mapping[str, tuple[Any, ...]]
    draw: Callable[..., Scene]
    assumes: str = ""

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
            return replace(self.draw(**chosen), assumes=self.assumes)
        except ValueError as refusal:
            return Scene((), (), "", str(refusal))
