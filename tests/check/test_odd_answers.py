"""Checks never raise and never pass nonsense: every check of every lesson, fed odd answers."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from pardemo import check
from pardemo.check import Verdict


class Unshowable:
    """Raises wherever it is touched."""

    def __repr__(self) -> str:
        raise ValueError("no repr")

    def __eq__(self, other: object) -> bool:
        raise ValueError("no comparison")

    __hash__ = None  # type: ignore[assignment]


class UnshowableError(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


def returns(value: Any) -> Callable[..., Any]:
    return lambda *args, **named: value


def raises(error: BaseException) -> Callable[..., Any]:
    def answer(*args: Any, **named: Any) -> Any:
        raise error

    return answer


def counts(*args: Any) -> Iterator[int]:
    yield from range(3)


def never_ends_its_recursion(*args: Any) -> Any:
    return never_ends_its_recursion(*args)


VALUES = [
    math.nan, math.inf, -math.inf, -1, 10**5000, -(10**5000), 1e308, 1j, True, "", "x" * 10_000,
    b"", (), [], [None], {}, {"a": math.nan}, {1, 2}, object(), Unshowable(), [Unshowable()],
    type, Ellipsis, torch.ones(3), torch.tensor(math.nan), torch.empty(0), np.ones((2, 2)),
    np.float32("nan"), range(10), "1", [[]], [1, "2", None],
]  # fmt: skip
ERRORS = [
    ValueError("no"), UnshowableError(), SystemExit(3), RecursionError(), StopIteration(),
    MemoryError(), AssertionError(), KeyError(0), NotImplementedError(),
]  # fmt: skip
ODD = [
    *VALUES, *map(returns, [None, *VALUES]), *map(raises, ERRORS),
    counts, never_ends_its_recursion, lambda: 1, lambda a, b, c, d, e, f, g, h, i: 1,
    print, len, Unshowable,
]  # fmt: skip
CHECKS = [
    (module.name, name)
    for module in pkgutil.iter_modules(check.__path__)
    if module.name.startswith("lesson")
    for name, function in vars(importlib.import_module(f"pardemo.check.{module.name}")).items()
    if inspect.isfunction(function)
    and function.__module__ == f"pardemo.check.{module.name}"
    and not name.startswith("_")
    and hasattr(function, "__wrapped__")
]


def test_there_are_three_checks_a_lesson() -> None:
    assert len(CHECKS) == 3 * len({lesson for lesson, _ in CHECKS}) == 45


@pytest.mark.parametrize(("lesson", "name"), CHECKS, ids=lambda value: str(value))
def test_odd_answers_get_a_verdict_that_can_be_shown_and_never_pass(lesson: str, name: str) -> None:
    checked = getattr(importlib.import_module(f"pardemo.check.{lesson}"), name)
    for place, answer in enumerate(ODD):
        verdict = checked(answer)
        assert isinstance(verdict, Verdict), place
        assert verdict.status in ("not yet", "not attempted"), f"odd answer {place}: {verdict!r}"
        assert len(repr(verdict)) < 2000
        assert verdict._repr_html_().startswith("<div>")
    assert checked().status == "not attempted"
    assert checked(1, 2, 3, 4, 5, 6, 7).status == "not yet"


@pytest.mark.parametrize("number", [6.0, torch.tensor(6.0), torch.tensor([6]), np.int64(6), 6])
def test_a_right_number_passes_in_whatever_it_is_wrapped(number: Any) -> None:
    @check.verdict
    def six(answer: Any) -> str:
        check.demand(answer, 6, "")
        return ""

    assert six(number).status == "passed"


def test_stopping_is_the_learners_right_also_inside_a_check() -> None:
    with pytest.raises(KeyboardInterrupt):
        check.lesson03.combine(raises(KeyboardInterrupt()))
