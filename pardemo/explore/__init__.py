"""Explorers: pipeline schedules, the ring, ZeRO's memory, DDP's buckets, layouts.

In a notebook: `explore.show("pipeline", stages=4)` is a picture; `explore.live("pipeline")` has
sliders in a live kernel. `explore.fragment(name)` is a piece of HTML that needs no kernel and no
network, alone or beside others on one page; `explore.page()` is one document with all of them.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from pardemo.explore import buckets, pipeline, planner, ring, zero
from pardemo.explore.scene import Box, Explorer, Scene

if TYPE_CHECKING:
    from pardemo.explore.widget import Live
    from pardemo.plot.style import Picture

__all__ = ["Box", "Explorer", "Scene", "fragment", "get", "live", "names", "page", "scene", "show"]

_ALL = {
    module.EXPLORER.name: module.EXPLORER for module in (pipeline, ring, zero, buckets, planner)
}


def names() -> list[str]:
    """The explorers there are."""
    return list(_ALL)


def get(name: str) -> Explorer:
    """The explorer called `name`; ValueError with the nearest name for any other."""
    if name not in _ALL:
        near = difflib.get_close_matches(name, _ALL, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_ALL)}"
        raise ValueError(f"no explorer is called {name!r}; {hint}")
    return _ALL[name]


def scene(name: str, **values: Any) -> Scene:
    """What the explorer shows for these values of its controls."""
    return get(name).scene(**values)


def show(name: str, **values: Any) -> Picture:
    """The explorer's picture for these values, without its caption."""
    return scene(name, **values).figure()


def live(name: str) -> Live:
    """Sliders and the picture, for a live kernel."""
    from pardemo.explore.widget import Live

    return Live(get(name))


def fragment(name: str, level: int = 2) -> str:
    """One explorer as HTML to put into a page, beside others; its title is a heading of `level`."""
    from pardemo.explore.static import fragment as piece

    return piece(get(name), level)


def page() -> str:
    """One self-contained HTML document with every explorer; no kernel, no network."""
    from pardemo.explore.static import page as whole

    return whole(list(_ALL.values()))
