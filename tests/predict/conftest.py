"""One option: where the large published tables lie; their tests skip, loudly, without it."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`pytest tests/predict --published=FOLDER` scores the large tables too."""
    parser.addoption("--published", default=None, help="folder of the large published tables")
