"""One self-contained HTML file per benchmark session: findings first, nothing loaded from outside.

It is made from executed notebooks: their prose, tables, figures and captions in order, the code
folded away. Cells tagged `verdict` come first; `table` is also what the terminal prints.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

STYLE = Path(__file__).with_name("page.css")
READING = (
    "A time is the median over all rounds of the slowest rank's time for one optimiser step; the "
    "interval is a 95 % bootstrap over rounds, in which all variants ran interleaved.",
    "A speed-up has a baseline: one rank with one thread, and one rank with all cores. The second "
    "is what you would do without any of this, so it is the one to beat.",
    "A prediction was made before its measurement, from a calibration of this machine. Its error "
    "is printed, not corrected.",
    "Bytes are counted from the transfers that really ran, and set beside the closed form.",
    "Exposed transfer is the time a step would save if its transfers cost nothing; idle is the "
    "time a rank waits for another.",
)


@dataclass(frozen=True)
class Session:
    """What a report shows: executed notebooks by title, the machine card, and doubts in words.

    `explorers` are pieces of HTML that need nothing from outside (`explore.fragment`).
    """

    title: str
    card: str
    notebooks: tuple[tuple[str, NotebookNode], ...]
    doubts: tuple[str, ...] = ()
    records: str = ""
    explorers: tuple[str, ...] = ()


def write(session: Session, path: Path) -> Path:
    """Write the report as one private file; returns its path."""
    sections = [_section(name, notebook) for name, notebook in session.notebooks]
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(session.title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<style>{STYLE.read_text()}</style></head><body><main>
<h1>{html.escape(session.title)}</h1>
<p class="when">{datetime.now(UTC):%Y-%m-%d %H:%M} UTC</p>
{_contents(session)}
<h2 id="found">What was found</h2>
{_verdicts(session)}
<h2 id="doubts">What cannot be trusted</h2>
{_listed(session.doubts or ("Nothing was flagged: the machine was quiet and every ratio held.",))}
<h2 id="machine">This machine</h2>
<pre>{html.escape(session.card)}</pre>
<h2 id="reading">How to read a number</h2>
{_listed(READING)}
{"".join(sections)}
{_explorers(session)}
<footer>{html.escape(session.records)}</footer>
</main></body></html>
"""
    handle = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as out:
        out.write(page)
    return path


def _contents(session: Session) -> str:
    """Links to the parts of the page."""
    places = [
        ("found", "What was found"), ("doubts", "What cannot be trusted"),
        ("machine", "This machine"), ("reading", "How to read a number"),
        *((_anchor(name), name) for name, _ in session.notebooks),
    ]  # fmt: skip
    if session.explorers:
        places.append(("explorers", "Turn the knobs"))
    links = (f'<a href="#{place}">{html.escape(text)}</a>' for place, text in places)
    return f"<nav>{' · '.join(links)}</nav>"


def _anchor(name: str) -> str:
    return re.sub(r"[^\w-]+", "-", name)


def _explorers(session: Session) -> str:
    """Arithmetic to play with: what would change on other machines and sizes."""
    if not session.explorers:
        return ""
    said = (
        "Nothing here was measured: each picture is the package's own arithmetic for the values "
        "you choose, to show why the numbers above are what they are, and what would change them."
    )
    pieces = "".join(session.explorers)
    return f'<section id="explorers"><h2>Turn the knobs</h2><p>{said}</p>{pieces}</section>'


def text_of(notebook: NotebookNode, tag: str) -> list[str]:
    """The text of the outputs of every cell with a tag, as the terminal shows it."""
    return [
        _text(output)
        for cell in notebook.cells
        if cell.cell_type == "code" and tag in cell.metadata.get("tags", [])
        for output in cell.outputs
    ]


def _verdicts(session: Session) -> str:
    found = [text for _, notebook in session.notebooks for text in text_of(notebook, "verdict")]
    return _listed(line for text in found for line in text.splitlines() if line.strip())


def _listed(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def _section(name: str, notebook: NotebookNode) -> str:
    """A notebook as a reader wants it: prose and results; the code is there, folded."""
    parts, code = [], []
    for cell in notebook.cells:
        source = "".join(cell.source)
        if cell.cell_type == "markdown":
            parts.append(_markdown(source))
        elif cell.cell_type == "code":
            code.append(source)
            if {"parameters", "injected-parameters"} & set(cell.metadata.get("tags", [])):
                parts.append(f"<pre>{html.escape(source)}</pre>")
            parts += [_output(output) for output in _joined(cell.outputs)]
    body = "\n".join(part for part in parts if part)
    folded = html.escape("\n\n".join(code))
    return (
        f'<section id="{_anchor(name)}">{body}<details><summary>The code of {html.escape(name)}'
        f"</summary><pre>{folded}</pre></details></section>"
    )


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Consecutive prints as one text: a kernel sends them in pieces."""
    found: list[NotebookNode] = []
    for output in outputs:
        if found and output.output_type == found[-1].output_type == "stream":
            found[-1] = NotebookNode({**found[-1], "text": found[-1].text + output.text})
        else:
            found.append(output)
    return found


def _output(output: NotebookNode) -> str:
    """One output as HTML: a figure with its alt text, a table, prose, or plain text."""
    data: dict[str, Any] = output.get("data", {})
    if "image/png" in data:
        alt = output.get("metadata", {}).get("image/png", {}).get("alt", "")
        picture = "".join(str(data["image/png"]).split())
        return (
            f'<figure><img alt="{html.escape(alt)}" src="data:image/png;base64,{picture}"></figure>'
        )
    if "text/markdown" in data:
        return f'<div class="caption">{_markdown("".join(data["text/markdown"]))}</div>'
    if "text/html" in data:
        return f'<div class="wide">{_harmless("".join(data["text/html"]))}</div>'
    text = _text(output)
    return f"<pre>{html.escape(text)}</pre>" if text.strip() else ""


def _text(output: NotebookNode) -> str:
    if output.output_type == "error":
        return f"{output.ename}: {output.evalue}"
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", ""))


def _markdown(source: str) -> str:
    from nbconvert.filters.markdown_mistune import markdown2html_mistune

    made = markdown2html_mistune(source)
    made = re.sub(r'<a class="anchor-link".*?</a>', "", made)
    return re.sub(r"<(/?)h([1-4])", lambda m: f"<{m[1]}h{int(m[2]) + 1}", made)


def _harmless(source: str) -> str:
    """An HTML table without the styles and scripts that pandas puts beside it."""
    return re.sub(r"<(style|script)\b.*?</\1>", "", source, flags=re.DOTALL | re.IGNORECASE)
