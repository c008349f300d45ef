"""Verdicts: the answer of every check, and the decorator that makes exercise checks never raise."""

from __future__ import annotations

import functools
import html
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

PASSED, NOT_YET, NOT_ATTEMPTED = "passed", "not yet", "not attempted"


@dataclass(frozen=True)
class Verdict:
    """What a check found; true when passed. `status` is one of the three words above."""

    status: str
    text: str = ""

    def __bool__(self) -> bool:
        return self.status == PASSED

    def __repr__(self) -> str:
        return f"{self.status}: {self.text}" if self.text else self.status

    def _repr_html_(self) -> str:
        mark = {PASSED: "✓", NOT_YET: "✗"}.get(self.status, "·")
        text = html.escape(self.text).replace("\n", "<br>")
        return f"<div><b>{mark} {self.status}</b>{': ' if text else ''}{text}</div>"


class NotYet(Exception):
    """Raised inside a check: what the learner's answer gave, what was expected, and a hint."""

    def __init__(self, got: Any, expected: Any, hint: str = "") -> None:
        self.got, self.expected, self.hint = got, expected, hint
        super().__init__(
            f"got {_short(got)}, expected {_short(expected)}.{' ' if hint else ''}{hint}"
        )


def demand(got: Any, expected: Any, hint: str = "") -> None:
    """Raise NotYet unless `got == expected` (numbers: to nine digits)."""
    if not _equal(got, expected):
        raise NotYet(got, expected, hint)


def verdict(check: Callable[..., str | None]) -> Callable[..., Verdict]:
    """Turn a check that raises NotYet into one that returns a Verdict and never raises.

    The check's first argument is the learner's answer. None, and a function that is still a stub
    (its body is a docstring, `...`, `pass` or `raise NotImplementedError`), are "not attempted". An
    error inside the learner's function is "not yet". What the check returns is added to "passed".
    """

    @functools.wraps(check)
    def checked(*answers: Any, **named: Any) -> Verdict:
        given = [*answers, *named.values()]
        if not given or any(answer is None or is_stub(answer) for answer in given):
            return Verdict(NOT_ATTEMPTED, "write your answer in the cell above, then run this one")
        try:
            said = check(*answers, **named)
        except NotYet as error:
            return Verdict(NOT_YET, str(error))
        except NotImplementedError:
            return Verdict(NOT_ATTEMPTED, "the function still raises NotImplementedError")
        except (Exception, SystemExit) as error:
            return Verdict(NOT_YET, f"your code raised {_cause(error)}")
        return Verdict(PASSED, said or "")

    return checked


def is_stub(answer: Any) -> bool:
    """Whether a function's body is only a docstring and one of `...`, `pass`, `return None`."""
    if answer is Ellipsis:
        return True
    if not inspect.isfunction(answer):
        return False
    code = answer.__code__

    def empty() -> None: ...

    def documented() -> None:
        """Only a docstring."""

    return code.co_code in (empty.__code__.co_code, documented.__code__.co_code) and not any(
        const is not None and const != answer.__doc__ for const in code.co_consts
    )


def _cause(error: BaseException) -> str:
    """The learner's error, not the launcher's wrapping of it: its last lines."""
    text = f"{type(error).__name__}: {_said(str, error)}"
    return text if len(text) < 900 else f"{text[:300]} ... {text[-500:]}"


def _equal(got: Any, expected: Any) -> bool:
    """Numbers to nine digits, a tensor or array of one number as that number, the rest by `==`.

    An answer that cannot be compared is not equal: no wrong answer ends as an error of the check.
    """
    try:
        if getattr(got, "shape", None) is not None and hasattr(got, "item"):
            got = got.item()
        if isinstance(expected, bool) or isinstance(got, bool):
            return got is expected
        if isinstance(expected, Real) and isinstance(got, Real):
            return bool(got == expected) or math.isclose(got, expected, rel_tol=1e-9)
        return bool(got == expected)
    except Exception:
        return False


def _short(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return (
            f"{value:,}" if abs(value) < 10**30 else f"about 10^{value.bit_length() * 0.30103:.0f}"
        )
    text = value if isinstance(value, str) else _said(repr, value)
    return text if len(text) <= 200 else text[:197] + "..."


def _said(how: Callable[[Any], str], value: Any) -> str:
    """str() or repr() of what a learner made, which may raise too."""
    try:
        return how(value)
    except Exception as error:
        return f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"
