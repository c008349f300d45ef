"""Guarantees 5, 6, 9: names by allow-list, private files, no links, a closed list of notebooks."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from pardemo import bench, notebooks, records, sweep
from pardemo.cluster.templates import Plan
from pardemo.launch import servers
from pardemo.parameters import Refused
from pardemo.records import lock, store

HOSTILE = [
    "", "../x", "/etc/passwd", "a/b", "a\nb", "a\x00b", "-rf", "x; touch PWN", "$(touch PWN)",
    "`touch PWN`", "a'b", 'a"b', "ddp'; DROP TABLE runs; --", "x" * 5000, "\u202eevil", "é", ".",
]  # fmt: skip


def let_through(accept: object) -> list[str]:
    """The hostile names that `accept` does not refuse: the checker of the tests below."""
    assert callable(accept)
    passed = []
    for name in HOSTILE:
        try:
            accept(name)
        except (Refused, ValueError, KeyError):
            continue
        passed.append(name)
    return passed


def test_the_checker_finds_a_name_that_is_let_through() -> None:
    assert let_through(str) == HOSTILE
    assert let_through(os.path.basename) == HOSTILE


def test_hostile_names_of_records_are_refused(tmp_path: Path) -> None:
    opened = records.open(tmp_path / "r" / "pardemo.sqlite")
    run = opened.begin("good")
    assert let_through(store.allowed) == []
    assert let_through(lambda name: opened.begin(name)) == []
    assert let_through(lambda name: run.add(name, {})) == []
    assert let_through(opened.find) == [""], "one run begins with nothing; there is just one run"


def test_hostile_names_of_notebooks_and_benchmarks_are_refused() -> None:
    assert let_through(notebooks.find) == []
    assert let_through(lambda name: sweep.checked(name, {})) == []
    assert let_through(lambda name: sweep.checked("strategies", {name: "1"})) == []


def test_hostile_values_of_a_cluster_template_are_refused() -> None:
    harmless = ["x" * 5000, "a/b"]  # letters only; an image may have a registry
    for field in ("name", "partition", "account", "interface", "master", "image", "time"):
        passed = let_through(lambda value, f=field: Plan(**{f: value}))
        assert [value for value in passed if value not in harmless] == [], field
    assert let_through(lambda value: Plan(folder=value)) == ["/etc/passwd"], "a path is a path"


def test_a_path_of_a_results_file_is_never_run(tmp_path: Path) -> None:
    """Notebooks come from the closed list beside the package: a planted one is not found."""
    book = new_notebook(cells=[new_code_cell("open('RAN', 'w')")])
    planted = tmp_path / "planted.ipynb"
    nbformat.write(book, planted)
    for name in (str(planted), "planted", "planted.ipynb", "../planted"):
        with pytest.raises(Refused, match="no notebook"):
            notebooks.find(name)
    for name in notebooks.known():
        assert notebooks.find(name).parent.parent == notebooks.ROOT


def open_modes(folder: Path) -> list[str]:
    """Files that others may read and folders that others may enter: the checker of the next two."""
    return [
        f"{path.relative_to(folder)} {stat.S_IMODE(path.lstat().st_mode):o}"
        for path in [folder, *folder.rglob("*")]
        if stat.S_IMODE(path.lstat().st_mode) & 0o077 and not path.is_symlink()
    ]


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
def test_what_is_written_is_private_whatever_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records, journals, exports, executed notebooks, the report, the timing lock, under umask 0.
    Broken on purpose first: a file written with plain `open` is found."""
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "file").write_text("")
    assert open_modes(plain) == [". 777", "file 666"]
    monkeypatch.setattr(notebooks, "ROOT", tmp_path / "clone")
    monkeypatch.setattr(lock, "lock_path", lambda: tmp_path / "own" / "timing.lock")
    (tmp_path / "clone" / "benchmarks").mkdir(parents=True)
    book = new_notebook(cells=[new_code_cell("print(1)")])
    book.metadata["kernelspec"] = dict(notebooks.KERNEL)
    nbformat.write(book, tmp_path / "clone" / "benchmarks" / "small.ipynb")
    results = tmp_path / "results"
    assert bench.run([sweep.checked("small", {})], results) == 0
    opened = records.open(results / "pardemo.sqlite")
    records.export(opened, results / "out.csv")
    with lock.timing("a test", path=results / "lock" / "timing.lock"):
        assert open_modes(results) == []
    assert {path.suffix for path in results.rglob("*")} >= {".sqlite", ".ipynb", ".html", ".csv"}


def test_symbolic_links_are_refused_wherever_something_is_written(tmp_path: Path) -> None:
    """The target of each link must not come to be. Broken on purpose: `open` follows it."""
    target = tmp_path / "elsewhere"
    link = tmp_path / "link.csv"
    link.symlink_to(target)
    opened = records.open(tmp_path / "r" / "pardemo.sqlite")
    with pytest.raises(Refused, match="symbolic link"):
        records.export(opened, link)
    for place in (tmp_path / "s" / "pardemo.sqlite", tmp_path / "t"):
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(target)
        with pytest.raises(Refused, match="symbolic link"):
            records.open(place if place.suffix else place / "pardemo.sqlite")
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock" / "timing.lock").symlink_to(target)
    with (
        pytest.raises(OSError, match="symbolic link"),
        lock.timing("a test", path=tmp_path / "lock" / "timing.lock"),
    ):
        pass
    assert not target.exists()
    link.write_text("followed")
    assert target.exists()


def test_ranks_talk_to_the_kernel_over_sockets_without_a_name() -> None:
    """No file and no port by which another user could reach a rank's pickles."""
    source = Path(servers.__file__).read_text()
    assert "socketpair" in source
    assert "AF_INET" not in source
