"""The widget: the controls of an explorer in a live kernel, and its picture below them.

The picture is an HTML widget and not an Output widget: a notebook client that meets an Output
widget (nbclient 0.11: papermill, nbconvert, nbmake) sends on the socket on which it waits for the
cell's reply, and now and then never sees that reply.
"""

from __future__ import annotations

import base64
import html
from typing import Any

import ipywidgets as widgets

from pardemo.explore.scene import Explorer


class Live(widgets.VBox):
    """Sliders and the picture they change; where widgets cannot show, the picture alone does."""

    def __init__(self, explorer: Explorer) -> None:
        self.explorer = explorer
        self.controls = {
            name: widgets.SelectionSlider(
                options=sorted(values) if _numbers(values) else list(values),
                value=values[0],
                description=name.replace("_", " "),
                style={"description_width": "10em"},
                layout={"width": "32em"},
                continuous_update=False,
            )
            for name, values in explorer.controls.items()
        }
        self.picture = widgets.HTML()
        super().__init__([*self.controls.values(), self.picture])
        for control in self.controls.values():
            control.observe(self._show, names="value")
        self._show()

    def _show(self, _: Any = None) -> None:
        scene = self.explorer.scene(**{name: knob.value for name, knob in self.controls.items()})
        parts = []
        if scene.lanes:
            figure = scene.figure()
            data = base64.b64encode(figure.png()).decode("ascii")
            alt = html.escape(figure.alt, quote=True)
            source = f"data:image/png;base64,{data}"
            parts.append(f'<img style="max-width: 100%" alt="{alt}" src="{source}">')
        parts.append(f"<p><b>{html.escape(scene.said)}</b> {html.escape(scene.assumes)}</p>")
        self.picture.value = "".join(parts)

    def __repr__(self) -> str:
        """What is stored in a notebook's file, where sliders cannot be."""
        knobs = ", ".join(name.replace("_", " ") for name in self.controls)
        return f"{self.explorer.title}: run this cell in a live kernel for sliders ({knobs})"

    __str__ = __repr__


def _numbers(values: tuple[Any, ...]) -> bool:
    return all(isinstance(value, int | float) for value in values)
