"""environment.yml, pyproject.toml and constraints.txt say the same, and what is installed fits."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
CONDA_NAMES = {  # PyPI's name -> conda-forge's, where they differ
    "torch": "pytorch",
    "matplotlib": "matplotlib-base",
    "jupyter-server": "jupyter_server",
}
ONLY_CONDA = {"python", "pip", "make"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WANTED = [
    Requirement(text)
    for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())


def conda_packages() -> dict[str, Requirement]:
    lines = [line for line in CONDA["dependencies"] if isinstance(line, str)]
    (pip,) = [line["pip"] for line in CONDA["dependencies"] if isinstance(line, dict)]
    lines += [line for line in pip if not line.startswith("-")]
    return {Requirement(line).name: Requirement(line) for line in lines}


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().split()
    return dict(line.split("==") for line in lines)


@pytest.mark.parametrize("wanted", WANTED, ids=lambda wanted: wanted.name)
def test_conda_gets_the_same_dependency_with_the_same_bound(wanted: Requirement) -> None:
    name = CONDA_NAMES.get(wanted.name, wanted.name.lower())
    assert name in conda_packages()
    assert conda_packages()[name].specifier == wanted.specifier


def test_conda_gets_nothing_that_pyproject_does_not_name() -> None:
    known = {CONDA_NAMES.get(wanted.name, wanted.name.lower()) for wanted in WANTED}
    assert set(conda_packages()) == known | ONLY_CONDA
    assert str(conda_packages()["python"].specifier) == PROJECT["requires-python"]


def test_conda_forge_is_the_only_channel() -> None:
    assert CONDA["channels"] == ["conda-forge", "nodefaults"]


@pytest.mark.parametrize("wanted", WANTED, ids=lambda wanted: wanted.name)
def test_the_pinned_and_the_installed_version_fit(wanted: Requirement) -> None:
    pins = {canonicalize_name(name): version for name, version in constraints().items()}
    pinned = pins[canonicalize_name(wanted.name)]
    assert pinned in wanted.specifier
    assert metadata.version(wanted.name).split("+")[0] in wanted.specifier


def test_constraints_hold_versions_only_no_address_and_no_local_build() -> None:
    for line in (ROOT / "constraints.txt").read_text().split():
        assert line.count("==") == 1
        assert not any(mark in line for mark in ("://", "@", "+", "/"))


def test_what_is_pinned_runs_on_the_oldest_python_that_is_promised() -> None:
    """A pin that needed 3.11.5 let no machine with Debian 12's 3.11.2 set up."""
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    pinned = constraints()
    newer = [
        f"{one.name} {one.version} needs {one.metadata['Requires-Python']}"
        for one in metadata.distributions()
        if canonicalize_name(one.name) in map(canonicalize_name, pinned)
        and not SpecifierSet(one.metadata["Requires-Python"] or "").contains(oldest)
    ]
    assert not newer
