"""Does what is installed fit what pardemo asks for? Asked before torch is imported."""

from __future__ import annotations

import sys
from importlib import metadata

from .stop import is_command

REMEDY = "`make setup` in the clone installs what fits"


def misfit(package: str) -> str:
    """Wanted and found, and the remedy, when an installed package does not fit; else "".

    What is wanted is what pardemo's own metadata asks for (pyproject.toml).
    """
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(line) for line in metadata.requires("pardemo") or ()]
    except metadata.PackageNotFoundError:
        return ""  # run from a clone that is not installed: nothing says what is wanted
    wanted = next((ask.specifier for ask in asked if ask.name == package and not ask.marker), None)
    if wanted is None:
        return ""
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"pardemo needs {package} {wanted}, found none; {REMEDY}"
    if wanted.contains(found, prereleases=True):
        return ""
    return f"pardemo needs {package} {wanted}, found {found}; {REMEDY}"


def demand(package: str) -> None:
    """Refuse to go on with a version that does not fit: one line and exit code 2 as a command,
    ImportError in a notebook or a script."""
    if not (said := misfit(package)):
        return
    if is_command():
        print(f"pardemo: {said}", file=sys.stderr)
        raise SystemExit(2)
    raise ImportError(said)
