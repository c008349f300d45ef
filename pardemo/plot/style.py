"""The house style: one look, one colour per strategy, and figures that carry their alt text.

Colours are Okabe and Ito's (2008), told apart by colour-blind readers; hatch and marker say the
same again for those who print in grey. Matplotlib ships them as the "okabe_ito" sequence.
"""

from __future__ import annotations

import functools
import io
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE = "pardemo.pardemo"
OKABE_ITO = tuple(matplotlib.color_sequences["okabe_ito"])


class Look(NamedTuple):
    """How one thing is drawn everywhere."""

    colour: Any
    hatch: str
    marker: str


ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILION, PURPLE, BLACK, GREY = "#0072B2", "#D55E00", "#CC79A7", "#333333", "#999999"

LOOKS = {
    "single": Look(BLACK, "", "o"),
    "single on all cores": Look(GREY, "", "o"),
    "data_parallel": Look(ORANGE, "//", "s"),
    "ddp": Look(BLUE, "", "D"),
    "model_parallel": Look(VERMILION, "..", "v"),
    "pipeline": Look(GREEN, "\\\\", "^"),
    "tensor": Look(SKY, "xx", "P"),
    "zero": Look(PURPLE, "++", "X"),
    "zero1": Look(PURPLE, "++", "X"),
    "fsdp": Look(YELLOW, "--", "*"),
    "context": Look(SKY, "oo", "<"),
    "expert": Look(ORANGE, "||", ">"),
    "combined": Look(GREEN, "**", "h"),
    # collectives
    "all_reduce": Look(BLUE, "", "o"),
    "all_gather": Look(ORANGE, "//", "s"),
    "reduce_scatter": Look(GREEN, "\\\\", "^"),
    "all_to_all": Look(VERMILION, "..", "D"),
    "broadcast": Look(SKY, "xx", "v"),
    "reduce": Look(PURPLE, "++", "P"),
    "send": Look(BLACK, "", "X"),
    # the parts of a step, and what a rank can be doing
    "compute": Look(BLUE, "", "o"),
    "forward": Look(BLUE, "", "o"),
    "backward": Look(SKY, "//", "s"),
    "weight": Look(PURPLE, "..", "P"),
    "exposed": Look(VERMILION, "//", "v"),
    "collective": Look(VERMILION, "xx", "v"),
    "transfer": Look(VERMILION, "xx", "v"),
    "optimizer": Look(GREEN, "\\\\", "^"),
    "idle": Look("#dddddd", "", "x"),
    "rest": Look(YELLOW, "..", "*"),
    "parameters": Look(BLUE, "", "o"),
    "gradients": Look(ORANGE, "//", "s"),
    "activations": Look(SKY, "..", "^"),
    "buffers": Look(GREY, "xx", "x"),
}
# what is drawn in one way by its exact name only: "weight 0.1" is no part of a step
PARTS = ("compute", "forward", "backward", "weight", "exposed", "collective", "transfer",
         "optimizer", "idle", "rest", "parameters", "gradients", "activations",
         "buffers")  # fmt: skip
HATCHES = ("", "//", "\\\\", "xx", "..", "++", "--", "||")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")


def look(name: str) -> Look:
    """Colour, hatch and marker of `name`: fixed where known, else derived from the name."""
    if name in LOOKS:
        return LOOKS[name]
    known = [key for key in LOOKS if name.startswith(key) and key not in PARTS]
    if known:
        return LOOKS[max(known, key=len)]
    code = zlib.crc32(name.encode())
    return Look(
        OKABE_ITO[code % len(OKABE_ITO)],
        HATCHES[code // 8 % len(HATCHES)],
        MARKERS[code // 64 % len(MARKERS)],
    )


class Picture(Figure):
    """A figure that shows itself as one PNG with alt text, and whose repr is that text."""

    alt = ""
    shown = False
    fitted = False  # whether the height follows the number of rows

    def png(self) -> bytes:
        """The picture as PNG bytes."""
        out = io.BytesIO()
        self.savefig(out, format="png", metadata={"Description": self.alt})
        return out.getvalue()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
        self.shown = True
        return {"image/png": self.png(), "text/plain": self.alt}, {"image/png": {"alt": self.alt}}

    def __repr__(self) -> str:
        return self.alt

    __str__ = __repr__


class Caption(str):
    """A caption; already displayed where it was made, so a cell that ends in it shows it once."""

    def _ipython_display_(self) -> None:
        return


_latest: Picture | None = None  # the figure that the next caption belongs to, unless it is shown


def figure(draw: Callable[..., str]) -> Callable[..., Picture]:
    """Turn `draw(axes, ...) -> alt text` into `plot.name(..., size=None, axes=None) -> Picture`.

    With `axes=` the drawing goes into a figure of the caller's (several panels beside each other).
    """

    @functools.wraps(draw)
    def made(
        *args: Any, size: tuple[float, float] | None = None, axes: Axes | None = None, **kw: Any
    ) -> Picture:
        global _latest
        with matplotlib.style.context(STYLE):
            if axes is not None:
                draw(axes, *args, **kw)
                return cast(Picture, axes.figure)
            picture = Picture(figsize=size)
            picture.fitted = size is None
            picture.alt = draw(picture.add_subplot(), *args, **kw)
        _latest = picture
        return picture

    return made


def panels(rows: int = 1, columns: int = 1, size: tuple[float, float] | None = None) -> Any:
    """An empty house figure and its array of axes, for pictures side by side."""
    with matplotlib.style.context(STYLE):
        picture = Picture(figsize=size or (3.6 * columns, 3.2 * rows))
        return picture, picture.subplots(rows, columns)


def caption(claim: str, *conditions: str) -> Caption:
    """Show a caption under the figure made last: the claim first (bold), then the conditions.

    Jupyter ignores the alt text of stored images, so what the figure shows must also stand below
    it as text. A figure made in the same cell and not yet shown is shown first.
    """
    text = Caption(" ".join([claim, *conditions]))
    if not in_notebook():
        return text
    from IPython.display import display

    if _latest is not None and not _latest.shown:
        display(_latest)
    marked = " ".join([f"**{claim}**", *conditions])
    display({"text/markdown": marked, "text/plain": str(text)}, raw=True)
    return text


def in_notebook() -> bool:
    """Whether this code runs in an IPython that can display."""
    try:
        from IPython.core.getipython import get_ipython
    except ImportError:
        return False
    return get_ipython() is not None


def use() -> None:
    """Make the house style the default of this session, for figures drawn by hand."""
    matplotlib.style.use(STYLE)


def field(row: Any, *names: str, default: Any = None) -> Any:
    """The first of `names` that a row has, mapping or object; NaN and None are absent."""
    for name in names:
        value = row.get(name) if isinstance(row, Mapping) else getattr(row, name, None)
        if value is not None and value == value:
            return value
    return default


def rows_of(table: Any) -> list[Any]:
    """The rows of a DataFrame, of a mapping name -> row, or of any sequence of rows."""
    if hasattr(table, "to_dict") and hasattr(table, "columns"):
        return table.to_dict("records")
    if isinstance(table, Mapping):
        return [{"name": name, "row": row} for name, row in table.items()]
    if hasattr(table, "rows"):
        return list(table.rows)
    return list(table)


def named(table: Any) -> list[tuple[str, Any]]:
    """(name, row) pairs of a table, whatever shape it came in."""
    pairs = []
    for position, row in enumerate(rows_of(table)):
        if isinstance(row, Mapping) and set(row) == {"name", "row"}:
            pairs.append((str(row["name"]), row["row"]))
        else:
            pairs.append((str(field(row, "name", "strategy", default=position)), row))
    return pairs


def label_rows(axes: Axes, labels: list[str], places: list[int] | None = None) -> None:
    """Name the rows of a horizontal figure, first on top, in a figure as high as they need."""
    places = list(range(len(labels))) if places is None else places
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    whole = axes.figure
    if isinstance(whole, Picture) and whole.fitted:
        whole.set_figheight(1.2 + 0.42 * max(len(labels), 2))


def lift_title(axes: Axes) -> None:
    """Put a title above the legend that stands on the axes, not into it."""
    if title := axes.get_title(loc="left"):
        axes.set_title(title, loc="left", pad=26)


def durations(values: Iterable[float]) -> tuple[float, str]:
    """The factor and unit that make these seconds readable: (1000, "ms") and the like."""
    top = max([abs(value) for value in values if value == value] or [1.0])
    return (1.0, "s") if top >= 1 else (1e3, "ms") if top >= 1e-3 else (1e6, "µs")


def sizes(values: Iterable[float]) -> tuple[float, str]:
    """The divisor and base-10 unit that make these bytes readable."""
    top = max([abs(value) for value in values if value == value] or [0.0])
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
    return next(((scale, unit) for scale, unit in units if top >= scale), (1.0, "B"))
