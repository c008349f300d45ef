"""A slider over rates of the cable, for a notebook: moving it runs a function at that rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as widgets

from pardemo.cluster.link import link


class Slider(widgets.VBox):
    """Calls `show(rate)` for the rate chosen, and shows what it prints below.

    Its first value is the first of `rates`. What `show` costs is paid at every move.
    """

    def __init__(self, rates: Sequence[str], show: Callable[[str], Any]) -> None:
        for rate in rates:
            link(rate)  # Refused for what is no rate
        self.rates = list(rates)
        self.rate = widgets.SelectionSlider(
            options=self.rates, description="cable", continuous_update=False,
            layout={"width": "32em"},
        )  # fmt: skip
        super().__init__([self.rate, widgets.interactive_output(show, {"rate": self.rate})])

    def __repr__(self) -> str:
        """What is stored in a notebook's file, where a slider cannot be."""
        return f"cable: run this cell in a live kernel for a slider ({', '.join(self.rates)})"

    __str__ = __repr__
