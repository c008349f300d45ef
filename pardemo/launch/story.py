"""The text of a failure: headline, the culprit's traceback, then every other rank."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping

from pardemo.launch.failure import Outcome, RankFailed, RankTimeout, culprit, death

_INDENT = "    "
_LINE_CHARS = 160
_ORIGIN = re.compile(r"^\[\S+:\d+\] ")  # where in gloo's sources an error was raised
_NOT_THE_LEARNERS = ("pardemo/launch/", "/multiprocessing/", "/threading.py", "<frozen ")
_LIBRARY = re.compile(r"^.*/(site-packages|python3\.\d+)/")
_FILE = re.compile(r'File "([^"]+)"')


def failure(
    outcomes: Mapping[int, Outcome], began: float, timeout: float | None, starting: bool = False
) -> RankFailed:
    """The exception for a failed call, or a failed start of the ranks.

    `timeout` is given when that is what ended it.
    """
    rank, why = culprit(outcomes)
    texts = {o.rank: _relabel(_text(o, began)) for o in outcomes.values()}
    if timeout is not None:
        why = f"{'not ready' if starting else 'no answer'} after {timeout:g} s: {why}"
    elif starting:
        why = f"before its process group was ready, {why}"
    stacks = timeout is not None or outcomes[rank].kind != "raised"
    if outcomes[rank].kind == "raised" and timeout is None:
        parts = ["\n".join([why, *texts[rank].splitlines()[1:]])]
    else:
        parts = [why, texts[rank]]
    for other in sorted(outcomes.keys() - {rank}):
        full = stacks and outcomes[other].kind == "waiting"
        parts.append(texts[other] if full else texts[other].splitlines()[0])
    kind = RankTimeout if timeout is not None else RankFailed
    return kind(_relabel("\n\n".join(parts)), rank, texts)


def stopped(outcomes: Mapping[int, Outcome]) -> str:
    """What is said when the stop button ended a call: one line per rank."""
    lines = [f"rank {o.rank}: {_place(o)}" for o in outcomes.values() if o.kind == "waiting"]
    return _relabel("stopped; the ranks have ended\n" + "\n".join(lines))


def _text(outcome: Outcome, began: float) -> str:
    """A line on what became of a rank, and below it, indented, its traceback or stack."""
    head = f"rank {outcome.rank}: "
    if outcome.kind == "returned":
        return f"{head}returned after {outcome.at - began:.2f} s"
    if outcome.kind == "died":
        return f"{head}{death(outcome.code)}\n{_indent(_frames(outcome.dump))}".rstrip()
    if outcome.kind == "raised":
        effect = "lost its connection, or waited too long: " if outcome.consequence else "raised "
        message = _ORIGIN.sub("", (outcome.meta["message"].splitlines() or [""])[0])
        line = f"{head}{effect}{outcome.meta['error']}: {message}"
        return f"{_short(line)}\n{_indent(outcome.meta['traceback'])}"
    stack = outcome.where.get("stack") or _frames(outcome.dump)
    return f"{head}{_place(outcome)}\n{_indent(stack)}".rstrip()


def _place(outcome: Outcome) -> str:
    """Where a rank that has not returned is: the torch call, the learner's line, the collective."""
    if not outcome.where:
        stopped = ": its process is stopped" if outcome.state == "T" else ""
        return f"did not answer when asked where it is{stopped}"
    doing, line = outcome.where["inside"], outcome.where["line"]
    said = f"in {doing}" if doing else "running"
    for entry in outcome.open_collectives.values():
        members = ", ".join(map(str, entry["ranks"]))
        line += f"; waits in {entry['name']}, collective number {entry['seq']} of ranks {members}"
    return f"{said}, {line}" if line else said


def _frames(dump: str) -> str:
    """A faulthandler dump without the frames that started the rank; innermost frame first."""
    kept = [line for line in dump.splitlines() if not any(m in line for m in _NOT_THE_LEARNERS)]
    blocks = "\n".join(kept).split("\n\n")
    return "\n".join(block for block in blocks if "  File" in block)


def _short(line: str) -> str:
    return line if len(line) <= _LINE_CHARS else line[: _LINE_CHARS - 3] + "..."


def _indent(text: str) -> str:
    return "\n".join(_INDENT + line for line in text.rstrip().splitlines())


def _relabel(text: str) -> str:
    """Call the file of a cell what the notebook calls it, `Cell In[3]`; shorten library paths."""
    shell = None
    with contextlib.suppress(ImportError):
        from IPython import get_ipython

        shell = get_ipython()
    numbers = getattr(getattr(shell, "compile", None), "_filename_map", {})

    def label(found: re.Match[str]) -> str:
        name = found.group(1)
        if name in numbers:
            return f"Cell In[{numbers[name]}]"
        return f'File "{_LIBRARY.sub("", name)}"'

    return _FILE.sub(label, text)
