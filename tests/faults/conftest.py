"""Faults that are planted once, or a few times, in `make test` and twenty times in `make soak`."""

from __future__ import annotations

import pytest

TIMES = 20


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Repeat what is marked `twenty`; only the first of them, or as many as it says, are no soak.

    Signals are sent three times in `make test`: `@pytest.mark.twenty(3)`.
    """
    if marker := metafunc.definition.get_closest_marker("twenty"):
        metafunc.fixturenames.append("turn")
        first = marker.args[0] if marker.args else 1
        more = [pytest.param(n, marks=pytest.mark.soak) for n in range(first + 1, TIMES + 1)]
        metafunc.parametrize("turn", [*range(1, first + 1), *more])
