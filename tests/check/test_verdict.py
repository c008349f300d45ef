"""Exercise checks never raise, know a stub from an answer, and say what was wrong."""

from __future__ import annotations

from typing import Any

import pytest

from pardemo.check import NotYet, demand, is_stub, verdict


@verdict
def doubled(answer: Any) -> str:
    demand(answer(21), 42, "Multiply by two.")
    return "as it should be"


def stub(x: int) -> int:  # type: ignore[empty-body]
    """Return twice x."""


def dots(x: int) -> int: ...  # type: ignore[empty-body]


def unfinished(x: int) -> int:
    raise NotImplementedError


def test_a_right_answer_passes_and_is_true() -> None:
    said = doubled(lambda x: 2 * x)
    assert said
    assert repr(said) == "passed: as it should be"


@pytest.mark.parametrize("answer", [None, ..., stub, dots, unfinished])
def test_nothing_attempted_is_neither_wrong_nor_right(answer: Any) -> None:
    said = doubled(answer)
    assert not said
    assert said.status == "not attempted"


def test_a_wrong_answer_is_told_what_it_gave_what_was_expected_and_a_hint() -> None:
    assert repr(doubled(lambda x: x)) == "not yet: got 21, expected 42. Multiply by two."


def test_an_error_in_the_learners_code_is_reported_not_raised() -> None:
    assert "your code raised ZeroDivisionError" in repr(doubled(lambda x: x / 0))


def test_functions_that_return_none_or_a_constant_on_purpose_are_not_stubs() -> None:
    calls: list[int] = []

    def acts(x: int) -> None:
        calls.append(x)

    assert not is_stub(acts)
    assert not is_stub(lambda: 3)
    assert not is_stub(3)
    assert is_stub(stub)


def test_numbers_are_compared_to_nine_digits_and_booleans_exactly() -> None:
    demand(0.1 + 0.2, 0.3)
    demand(3, 3.0)
    with pytest.raises(NotYet, match="got 1,000,000, expected 1,000,001"):
        demand(1_000_000, 1_000_001)
    with pytest.raises(NotYet):
        demand(1, True)


def test_html_shows_the_verdict_escaped() -> None:
    @verdict
    def refuse(answer: Any) -> None:
        raise NotYet("<b>", "a & b")

    html = refuse(1)._repr_html_()
    assert "✗ not yet" in html
    assert "<b>'" not in html
    assert "a &amp; b" in html
