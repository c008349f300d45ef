"""A slider over rates of the cable, for a notebook: moving it runs a function at that rate."""

from __future__ import annotations

import contextlib
import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as widgets

from pardemo.cluster.link import link


class Printed(io.TextIOBase):
    """A stream whose lines appear in an HTML widget as they are written."""

    def __init__(self, shown: widgets.HTML) -> None:
        self.shown = shown
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        self.shown.value = f"<pre>{html.escape(self.text)}</pre>"
        return len(text)


class Slider(widgets.VBox):
    """Calls `show(rate)` for the rate chosen, and shows what it prints below.

    Its first value is the first of `rates`. What `show` costs is paid at every move.
    """

    def __init__(self, rates: Sequence[str], show: Callable[[str], Any]) -> None:
        for rate in rates:
            link(rate)  # Refused for what is no rate
        self.rates = list(rates)
        self.call = show
        self.rate = widgets.SelectionSlider(
            options=self.rates, description="cable", continuous_update=False,
            layout={"width": "32em"},
        )  # fmt: skip
        self.shown = widgets.HTML()  # not an Output widget: explore/widget.py says why
        super().__init__([self.rate, self.shown])
        self.rate.observe(self._show, names="value")
        self._show()

    def _show(self, _: Any = None) -> None:
        printed = Printed(self.shown)
        try:
            with contextlib.redirect_stdout(printed):
                self.call(self.rate.value)
        except Exception as error:
            printed.write(f"{type(error).__name__}: {error}\n")
            raise

    def __repr__(self) -> str:
        """What is stored in a notebook's file, where a slider cannot be."""
        return f"cable: run this cell in a live kernel for a slider ({', '.join(self.rates)})"

    __str__ = __repr__
