"""Guarantee 10: what is installed is pinned, above the floors, and from nowhere unexpected."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
FLOORS = {  # package -> the first version without a hole that pardemo would be exposed to
    "torch": "2.10",  # CVE-2026-24747: memory corruption in the weights_only unpickler
    "jupyter-server": "2.18",  # CVE-2026-40934: the cookie secret outlived a password reset
}
UNWANTED = {"jupyter-server-proxy", "ray", "torchx", "notebook-shim-proxy"}
PIN = re.compile(r"[A-Za-z0-9][\w.-]*==\d[\w.]*")


def unpinned(lines: list[str]) -> list[str]:
    """Lines of a constraints file that are no plain pin: addresses, ranges, options, builds."""
    return [line for line in lines if line.strip() and not PIN.fullmatch(line.strip())]


def below_floor(versions: dict[str, str]) -> list[str]:
    """Packages with a version below their floor, or missing."""
    return [
        f"{name} {versions.get(name)} < {floor}"
        for name, floor in FLOORS.items()
        if Version(versions.get(name, "0")) < Version(floor)
    ]


def lowest(specifiers: dict[str, str]) -> dict[str, str]:
    """The lowest version each requirement allows."""
    found = {}
    for name, text in specifiers.items():
        bounds = [
            s.version for s in Requirement(f"x{text}").specifier if s.operator in (">=", "==")
        ]
        found[name] = max(bounds, key=Version, default="0")
    return found


LINES = (ROOT / "constraints.txt").read_text().splitlines()
PINS = {canonicalize_name(name): version for name, _, version in (x.partition("==") for x in LINES)}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ASKED = [
    Requirement(text)
    for group in (PROJECT["project"]["dependencies"],
                  *PROJECT["project"]["optional-dependencies"].values())
    for text in group
]  # fmt: skip


@pytest.mark.parametrize(
    "line",
    ["torch>=2.13", "torch @ https://x.invalid/torch.whl", "-e git+https://x.invalid/y", "torch",
     "--extra-index-url https://x.invalid", "torch==2.13.0+cu130", "torch==2.*"],
)  # fmt: skip
def test_a_line_that_pins_nothing_is_found(line: str) -> None:
    assert unpinned(["numpy==2.4.6", line]) == [line]


def test_a_version_below_its_floor_is_found() -> None:
    assert below_floor({"torch": "2.9.1", "jupyter-server": "2.21.1"}) == ["torch 2.9.1 < 2.10"]
    assert below_floor({"torch": "2.13.0"}) == ["jupyter-server None < 2.18"]
    assert lowest({"torch": ">=2.0,<3"}) == {"torch": "2.0"}


def test_every_constraint_is_a_plain_pin() -> None:
    assert unpinned(LINES) == []


def test_pinned_asked_and_installed_versions_are_above_the_floors() -> None:
    installed = {name: metadata.version(name) for name in FLOORS}
    asked = {canonicalize_name(ask.name): str(ask.specifier) for ask in ASKED}
    assert below_floor(PINS) == below_floor(installed) == []
    assert below_floor(lowest({name: asked[name] for name in FLOORS})) == []


def test_no_requirement_has_an_address_and_each_is_pinned() -> None:
    assert [str(ask) for ask in ASKED if ask.url] == []
    assert [ask.name for ask in ASKED if canonicalize_name(ask.name) not in PINS] == []


def test_what_is_installed_is_what_was_pinned() -> None:
    """Of everything that pardemo and its tests need, however far down."""
    wrong = {
        name: (version, metadata.version(name))
        for name, version in PINS.items()
        if name in INSTALLED and metadata.version(name).split("+")[0] != version
    }
    assert wrong == {}


INSTALLED = {canonicalize_name(d.metadata["Name"]) for d in metadata.distributions()}


def test_nothing_that_opens_the_machine_is_installed_or_asked_for() -> None:
    assert UNWANTED & {*PINS, *(canonicalize_name(ask.name) for ask in ASKED)} == set()


def test_nothing_is_fetched_past_the_index() -> None:
    """No file of ours turns checks off or names another place to install from."""
    wrong = re.compile(r"--trusted-host|--extra-index-url|--index-url|git\+|curl .*\|\s*(ba)?sh")
    assert wrong.search("pip install --trusted-host x y"), "the rule itself"
    for path in [ROOT / "Makefile", ROOT / "environment.yml", ROOT / "pyproject.toml",
                 *(ROOT / ".ci").iterdir()]:  # fmt: skip
        assert not wrong.search(path.read_text()), path
