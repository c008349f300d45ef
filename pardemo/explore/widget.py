"""The widget: the controls of an explorer in a live kernel, and its picture below them."""

from __future__ import annotations

from typing import Any

import ipywidgets as widgets
from IPython.display import Markdown, display

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
        shown = widgets.interactive_output(self._show, self.controls)
        super().__init__([*self.controls.values(), shown])

    def _show(self, **values: Any) -> None:
        scene = self.explorer.scene(**values)
        if scene.lanes:
            display(scene.figure())
        display(Markdown(f"**{scene.said}** {scene.assumes}"))

    def __repr__(self) -> str:
        """What is stored in a notebook's file, where sliders cannot be."""
        knobs = ", ".join(name.replace("_", " ") for name in self.controls)
        return f"{self.explorer.title}: run this cell in a live kernel for sliders ({knobs})"

    __str__ = __repr__


def _numbers(values: tuple[Any, ...]) -> bool:
    return all(isinstance(value, int | float) for value in values)
