"""Faults that are planted once in `make test` and twenty times in `make soak`."""

from __future__ import annotations

import pytest

TIMES = 20


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Repeat what is marked `twenty`; only the first of them is no soak."""
    if metafunc.definition.get_closest_marker("twenty"):
        metafunc.fixturenames.append("turn")
        more = [pytest.param(n, marks=pytest.mark.soak) for n in range(2, TIMES + 1)]
        metafunc.parametrize("turn", [1, *more])
