"""Guarantee 7: a secret in the environment lands in no record, report, notebook or export."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from pardemo import bench, notebooks, records, sweep
from pardemo.records import lock, surroundings

SECRET = "hunter2-never-written-down"
NAMES = ("API_TOKEN", "OMP_SECRET", "TORCH_PASSWORD", "NCCL_KEY", "HF_TOKEN", "PATH_OF_KEY")


def holding(folder: Path) -> list[Path]:
    """Files under `folder` that contain the secret: the checker."""
    return [p for p in folder.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]


def run_one(folder: Path, cell: str) -> Path:
    """Record one benchmark of one cell, export it, and return the results folder."""
    (folder / "clone" / "benchmarks").mkdir(parents=True)
    book = new_notebook(cells=[new_code_cell(cell)])
    book.metadata["kernelspec"] = dict(notebooks.KERNEL)
    nbformat.write(book, folder / "clone" / "benchmarks" / "small.ipynb")
    results = folder / "results"
    assert bench.run([sweep.checked("small", {})], results) == 0
    records.export(records.open(results / "pardemo.sqlite"), results / "out.jsonl")
    return results


CARD = "from pardemo import machine\nfrom pardemo.records import environment\n"


def test_a_secret_in_a_variable_is_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notebook prints all that pardemo knows of the machine and the environment."""
    monkeypatch.setattr(notebooks, "ROOT", tmp_path / "clone")
    monkeypatch.setattr(lock, "lock_path", lambda: tmp_path / "own" / "timing.lock")
    for name in NAMES:
        monkeypatch.setenv(name, SECRET)
    results = run_one(tmp_path, CARD + "print(machine().card(), environment())")
    assert holding(results) == []
    assert len(list(results.rglob("*.ipynb"))) == 1


def test_the_checker_finds_a_secret_that_was_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken on purpose: every variable is recorded, and a cell prints the environment."""
    monkeypatch.setattr(notebooks, "ROOT", tmp_path / "clone")
    monkeypatch.setattr(lock, "lock_path", lambda: tmp_path / "own" / "timing.lock")
    monkeypatch.setenv(NAMES[0], SECRET)
    monkeypatch.setattr(surroundings, "VARIABLES", NAMES)
    results = run_one(tmp_path, "import os; print(dict(os.environ))")
    names = {path.name for path in holding(results)}
    assert {"01-small.ipynb"} < names
    assert any(name.startswith("pardemo.sqlite") for name in names)


@pytest.mark.parametrize("name", surroundings.VARIABLES)
def test_what_is_recorded_is_named_in_full_and_is_no_place_for_secrets(name: str) -> None:
    assert name == name.upper()
    assert not any(word in name for word in ("KEY", "TOKEN", "SECRET", "PASS", "AUTH", "CRED"))
