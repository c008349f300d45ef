"""The page: an explorer as one self-contained HTML fragment that needs no kernel and no network.

Every setting is drawn in Python beforehand; the script only looks up the scene and puts its boxes
into an SVG, so that the numbers on the page are the package's own.
"""

from __future__ import annotations

import html
import json
from importlib.resources import files

from pardemo.explore.scene import KINDS, Explorer
from pardemo.explore.widget import _numbers
from pardemo.plot import look


def fragment(explorer: Explorer) -> str:
    """HTML with its style and script inside; several may stand on one page."""
    scenes = {
        json.dumps(list(values.values())): explorer.scene(**values).compact()
        for values in explorer.settings()
    }
    kinds = {kind for scene in scenes.values() for kind in scene["kinds"]}
    data = {
        "controls": {
            name: sorted(values) if _numbers(values) else list(values)
            for name, values in explorer.controls.items()
        },
        "first": [values[0] for values in explorer.controls.values()],
        "colours": {kind: look(KINDS.get(kind, kind)).colour for kind in sorted(kinds)},
        "scenes": scenes,
    }
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    sources = files("pardemo.explore")
    style = (sources / "explorer.css").read_text()
    script = (sources / "explorer.js").read_text()
    return (
        f'<section class="explorer" id="explorer-{explorer.name}" '
        f'aria-label="{html.escape(explorer.title)}">\n<style>{style}</style>\n'
        f"<h2>{html.escape(explorer.title)}</h2>\n<p>{html.escape(explorer.question)}</p>\n"
        '<div class="controls"></div>\n<div class="picture"></div>\n'
        '<p class="said" role="status"></p>\n'
        f'<script type="application/json">{text}</script>\n'
        f"<script>{script}</script>\n</section>\n"
    )


def page(explorers: list[Explorer]) -> str:
    """A whole HTML document with these explorers."""
    body = "".join(fragment(explorer) for explorer in explorers)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<title>pardemo explorers</title></head>\n"
        f"<body><main><h1>Explorers</h1>\n{body}</main></body></html>\n"
    )
