"""The page: an explorer as one self-contained HTML fragment that needs no kernel and no network.

Every setting is drawn in Python beforehand; the script only looks up the scene and puts its boxes
into an SVG, so that the numbers on the page are the package's own.
"""

from __future__ import annotations

import html
import json
from importlib.resources import files
from typing import Any

from pardemo.explore.scene import Explorer, ink, look_of
from pardemo.explore.widget import _numbers


def fragment(explorer: Explorer, level: int = 2) -> str:
    """HTML with its style and script inside; several may stand on one page, the same one too.

    `level` is that of the heading. Without a script the page still says the first setting's result.
    """
    sources = files("pardemo.explore")
    style = (sources / "explorer.css").read_text()
    script = (sources / "explorer.js").read_text()
    data = json.dumps(_data(explorer), separators=(",", ":")).replace("</", "<\\/")
    return (
        f'<section class="pardemo-explorer" data-explorer="{explorer.name}" '
        f'aria-label="{html.escape(explorer.title)}">\n<style>{style}</style>\n'
        f'<h{level} class="title">{html.escape(explorer.title)}</h{level}>\n'
        f"<p>{html.escape(explorer.question)}</p>\n"
        '<div class="controls"></div>\n<div class="picture"></div>\n'
        f'<p class="said" role="status">{html.escape(explorer.scene().said)}</p>\n'
        f'<p class="assumes">{html.escape(explorer.assumes)}</p>\n'
        f'<script type="application/json">{data}</script>\n'
        f"<script>{script}</script>\n</section>\n"
    )


def _data(explorer: Explorer) -> dict[str, Any]:
    """Every scene, the values of the controls, and how each kind of box is drawn."""
    scenes = {
        json.dumps(list(values.values())): explorer.scene(**values).compact()
        for values in explorer.settings()
    }
    kinds = sorted({kind for scene in scenes.values() for kind in scene["kinds"]})
    return {
        "controls": {
            name: sorted(values) if _numbers(values) else list(values)
            for name, values in explorer.controls.items()
        },
        "first": [values[0] for values in explorer.controls.values()],
        "colours": {kind: look_of(kind).colour for kind in kinds},
        "hatches": {kind: look_of(kind).hatch for kind in kinds},
        "inks": {kind: ink(kind) for kind in kinds},
        "scenes": scenes,
    }


def page(explorers: list[Explorer]) -> str:
    """A whole HTML document with these explorers."""
    body = "".join(fragment(explorer) for explorer in explorers)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        "<title>pardemo explorers</title></head>\n"
        f"<body><main><h1>Explorers</h1>\n{body}</main></body></html>\n"
    )
