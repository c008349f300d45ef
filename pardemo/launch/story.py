"""The text of a failure: headline, the culprit's traceback, then every other rank."""

from __future__ import annotations

import time
from collections.abc import Mapping

from pardemo.launch.failure import Outcome, RankFailed, RankTimeout, culprit, headline

_INDENT = "    "


def failure(
    outcomes: Mapping[int, Outcome], began: float, labels: Mapping[str, str], timeout: float | None
) -> RankFailed:
    """The exception for a failed call; `timeout` is given when that is what ended it.

    `labels` replaces file names of cells by what the notebook calls them.
    """
    rank, why = culprit(outcomes)
    texts = {o.rank: _relabel(_text(o, began), labels) for o in outcomes.values()}
    if timeout is not None:
        why = f"no answer after {timeout:g} s: {why}"
    order = [rank, *(r for r in sorted(outcomes) if r != rank)]
    everything = timeout is not None or outcomes[rank].kind != "raised"
    parts = [f"{why} (of {len(outcomes)} ranks)"]
    for other in order:
        full = other == rank or (everything and outcomes[other].kind == "waiting")
        parts.append(texts[other] if full else texts[other].splitlines()[0])
    kind = RankTimeout if timeout is not None else RankFailed
    return kind(_relabel("\n\n".join(parts), labels), rank, texts)


def _text(outcome: Outcome, began: float) -> str:
    """A line on what became of a rank, and below it, indented, its traceback or stack."""
    head = f"rank {outcome.rank}: "
    if outcome.kind == "returned":
        return f"{head}returned after {outcome.at - began:.2f} s"
    if outcome.kind == "died":
        return head + headline(outcome).split(" ", 2)[2]
    if outcome.kind == "raised":
        effect = ", a consequence" if outcome.consequence else ""
        lines = headline(outcome).split(" ", 2)[2].splitlines() or [""]
        return f"{head}{lines[0]}{effect}\n{_indent(outcome.meta['traceback'])}"
    doing = outcome.where.get("inside")
    line = outcome.where.get("line", "")
    said = f"in {doing}" if doing else "running"
    open_ones = [e for e in outcome.collectives.values() if not e["retired"]]
    recorded = "".join(
        f"; the flight recorder has {e['name']}, number {e['seq']} of the group of ranks {e['ranks']}"
        for e in open_ones
    )
    if not outcome.where:
        said = "did not answer when asked where it is"
    stack = outcome.where.get("stack") or outcome.dump
    return f"{head}{said}{' (' + line + ')' if line else ''}{recorded}\n{_indent(stack)}".rstrip()


def _indent(text: str) -> str:
    return "\n".join(_INDENT + line for line in text.rstrip().splitlines())


def _relabel(text: str, labels: Mapping[str, str]) -> str:
    for name, label in labels.items():
        text = text.replace(f'File "{name}"', label)
    return text


def now() -> float:
    """The clock that outcomes are stamped with, the same in all processes of one machine."""
    return time.monotonic()
