"""The README: its commands exist, its file tree is true, and the Chinese one keeps in step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.zh.md")


def _blocks(name: str) -> list[str]:
    """Fenced and indented code blocks, in order."""
    text = (ROOT / name).read_text()
    found = re.findall(r"```\w*\n(.*?)```|((?:^ {4}[^\n]*\n)+)", text, re.S | re.M)
    return [fenced or indented for fenced, indented in found]


def _tree(name: str) -> list[str]:
    """Paths of the file tree: the first word of each of its lines, below its folder."""
    block = next(b for b in _blocks(name) if b.lstrip().startswith("notebooks/"))
    paths, folder = [], ""
    for line in block.splitlines():
        word = line.split()[0]
        inside = line.startswith("      ")
        paths.append(folder + word if inside else word)
        folder = word if word.endswith("/") and not inside else folder if inside else ""
    return paths


@pytest.mark.parametrize("name", READMES)
def test_every_path_of_the_file_tree_exists(name: str) -> None:
    missing = [path for path in _tree(name) if not (ROOT / path).exists()]
    assert not missing


def test_every_room_of_the_package_is_in_the_file_tree() -> None:
    rooms = {p.name + "/" for p in (ROOT / "pardemo").iterdir() if (p / "__init__.py").exists()}
    assert rooms <= {path.removeprefix("pardemo/") for path in _tree("README.md")}


@pytest.mark.parametrize("name", READMES)
def test_every_link_leads_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text())
    dead = [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert len(links) > 15
    assert not dead


def test_every_lesson_is_in_the_map() -> None:
    text = (ROOT / "README.md").read_text()
    lessons = [path.name for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    assert [name for name in lessons if f"notebooks/{name}" not in text] == []


@pytest.mark.parametrize("name", READMES)
def test_every_make_target_that_is_named_exists(name: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = re.findall(r"\bmake ([a-z]+)", (ROOT / name).read_text())
    assert {"bench", "test", "lab"} <= set(named)
    assert set(named) <= targets


def test_the_chinese_readme_has_the_same_commands_code_and_file_tree() -> None:
    english, chinese = (_blocks(name) for name in READMES)
    assert len(english) == len(chinese)
    for ours, theirs in zip(english, chinese, strict=True):
        if "make " in ours:
            commands = [re.findall(r"make \w+", block) for block in (ours, theirs)]
            assert commands[0] == commands[1]
        elif not ours.lstrip().startswith("notebooks/"):
            assert ours == theirs
    assert _tree("README.md") == _tree("README.zh.md")
    links = [re.findall(r"\]\((notebooks/[^)]+)\)", (ROOT / n).read_text()) for n in READMES]
    assert links[0] == links[1]


def test_the_first_cell_of_the_readme_runs() -> None:
    code = next(block for block in _blocks("README.md") if "launch(add_up" in block)
    namespace: dict[str, object] = {"__name__": "__main__"}
    *lines, last = code.strip().splitlines()
    exec("\n".join(lines), namespace)
    results = eval(last, namespace)
    assert [value.tolist() for value in results] == [[1.0] * 3] * 2
