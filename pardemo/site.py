"""`make site`: the course as a static site, from the committed outputs, without a network.

Sphinx with myst-nb and sphinx-book-theme (extra `site`). Nothing is executed: a page shows what the
notebook's file holds. The explorers are on a page of their own and work without a kernel. Formulas
become MathML, which browsers draw themselves: a page loads nothing from elsewhere.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat

from pardemo import explore, scratch

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
project = "pardemo"
extensions = ["myst_nb", "pardemo.site"]
html_math_renderer = "mathml"
myst_enable_extensions = ["dollarmath"]
html_theme = "sphinx_book_theme"
html_title = "pardemo"
html_theme_options = {"use_download_button": False, "use_fullscreen_button": False,
                      "show_toc_level": 2, "home_page_in_toc": True}
html_show_sourcelink = False
html_copy_source = False
nb_execution_mode = "off"
nb_merge_streams = True
myst_heading_anchors = 4
suppress_warnings = ["myst.xref_missing", "mystnb.unknown_mime_type"]
"""


def setup(app: Any) -> dict[str, bool]:
    """The Sphinx extension that `CONFIG` names: formulas as MathML."""
    app.add_html_math_renderer(
        "mathml", inline_renderers=(_inline, None), block_renderers=(_block, None)
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _inline(writer: Any, node: Any) -> None:
    _write_math(writer, node, block=False)


def _block(writer: Any, node: Any) -> None:
    _write_math(writer, node, block=True)


def _write_math(writer: Any, node: Any, block: bool) -> None:
    """A formula in the page; one that docutils cannot read ends the build with its TeX."""
    from docutils import nodes
    from docutils.utils.math.latex2mathml import tex2mathml

    try:
        made = tex2mathml(node.astext(), as_block=block)
    except Exception as error:
        raise RuntimeError(f"no MathML for {node.astext()!r}: {error}") from error
    writer.body.append(f'<div class="math">{made}</div>' if block else made)
    raise nodes.SkipNode


def build(output: Path, source: Path | None = None) -> Path:
    """Build the site into `output`; returns its first page. RuntimeError holds Sphinx's words."""
    with scratch.folder() as temporary:
        work = source or temporary
        _write_source(work)
        command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
        done = subprocess.run(
            [*command, str(work), str(output)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"the site was not built: {done.stderr.strip()[-2000:]}")
    return output / "index.html"


def _write_source(work: Path) -> None:
    """Lay out what Sphinx reads: the README as first page, lessons, benchmarks, explorers."""
    (work / "conf.py").write_text(CONFIG)
    for folder in ("notebooks", "benchmarks"):
        (work / folder).mkdir()
        for path in sorted((ROOT / folder).glob("*.ipynb")):
            notebook = nbformat.read(path, 4)
            notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
            nbformat.write(notebook, work / folder / path.name)
    if (ROOT / "docs").exists():
        shutil.copytree(ROOT / "docs", work / "docs")
    lessons = _toctree("Lessons", sorted((work / "notebooks").glob("*.ipynb")))
    measured = _toctree("Benchmarks", sorted((work / "benchmarks").glob("*.ipynb")))
    readme = re.sub(r"\]\((\w+\.md|LICENSE)\)", "]", (ROOT / "README.md").read_text())
    chinese = (ROOT / "README.zh.md").read_text().replace("](README.md)", "](index.md)")
    (work / "README.zh.md").write_text(chinese)
    explorers = "```{toctree}\n:hidden:\n\nexplorers\n中文 <README.zh>\n```\n"
    (work / "index.md").write_text(f"{readme}\n{explorers}\n{lessons}\n{measured}")
    pieces = [f"```{{raw}} html\n{explore.fragment(name)}```\n" for name in explore.names()]
    intro = "# Explorers\n\nMove a slider; every number was computed by the package beforehand.\n"
    (work / "explorers.md").write_text("\n".join([intro, *pieces]))


def _toctree(caption: str, pages: list[Path]) -> str:
    entries = "\n".join(f"{page.parent.name}/{page.stem}" for page in pages)
    return f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"


def main() -> int:
    """Build into build/site and say where it is."""
    try:
        first = build(ROOT / "build" / "site")
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(first)
    return 0


if __name__ == "__main__":
    sys.exit(main())
