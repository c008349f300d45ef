"""Which rank was at fault.

When one rank fails, the others fail too: their connections break. The first report to arrive, and
even the earliest in time, is often such a consequence. So all reports are collected for a moment,
and the cause is looked for in this order: an error that is not about a connection, or a process
that died; a rank that returned while others waited for it; ranks that called different collectives;
a rank that was elsewhere, or behind, while the others waited.
"""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_CONNECTION = re.compile(
    r"connection (closed|reset|refused|was (closed|reset))|broken pipe|timed? ?out|timeout"
    r"|remote process exited|socket (is )?closed|pair closure|failed to recv"
    r"|monitoredBarrier|communicator was aborted|ncclRemoteError|store (is )?not available",
    re.IGNORECASE,
)
_TRANSPORT = re.compile(r"gloo|nccl|c10d|ProcessGroup|TCPStore|monitoredBarrier", re.IGNORECASE)
_ABORTED = re.compile(r"gloo::EnforceNotMet.*?preamble\S* \S+ \S+ (\d+) vs (\d+)", re.DOTALL)
_SIZES = re.compile(r"gloo.*(preamble|EnforceNotMet|enforce fail)|Detected mismatch", re.DOTALL)
_BARRIER = re.compile(r"Rank (\d+) failed to pass monitoredBarrier", re.IGNORECASE)
_MESSAGE_CHARS = 300
LOST = 1 << 16  # where a process's exit code would be: it runs, and cannot be talked to
_RECORDED = 1000  # collectives that the flight recorder surely still has
_EVEN = {"all_reduce", "allreduce", "broadcast", "all_gather", "reduce_scatter", "reduce"}


class RankFailed(Exception):
    """A rank failed. `rank` is the one at fault, `ranks` says of every rank what became of it."""

    def __init__(self, message: str, rank: int, ranks: Mapping[int, str]) -> None:
        super().__init__(message)
        self.rank = rank
        self.ranks = dict(ranks)

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.rank, self.ranks)

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the rank's traceback is the news, this package's frames are not."""
        return [f"{type(self).__name__}: {self}"]


class RankTimeout(RankFailed):
    """The ranks had not returned after `timeout` seconds; the message shows their stacks."""


@dataclass
class Outcome:
    """What became of one rank in one call. `kind` is waiting, returned, raised or died."""

    rank: int
    kind: str = "waiting"
    at: float = 0.0
    meta: dict[str, Any] = field(default_factory=dict)
    body: list[bytearray] | None = None
    code: int = 0
    where: dict[str, Any] = field(default_factory=dict)
    dump: str = ""
    last_words: str = ""
    state: str = ""

    @property
    def failed(self) -> bool:
        """Raised or died."""
        return self.kind in ("raised", "died")

    @property
    def lost(self) -> bool:
        """Whether it closed its connection; how its process ended is not known, or it runs."""
        return self.kind == "died" and self.code == LOST

    @property
    def consequence(self) -> bool:
        """Whether this is how a failure elsewhere looks from this rank."""
        return any(
            link["runtime"]
            and _CONNECTION.search(link["message"])
            and (link["in_torch"] or _TRANSPORT.search(link["message"]))
            for link in self.meta.get("chain", [])
        )

    @property
    def collectives(self) -> dict[str, dict[str, Any]]:
        """The newest collective of this rank in each process group."""
        found: dict[str, dict[str, Any]] = (self.where or self.meta).get("collectives", {})
        return found

    def calls_of(self, group: str) -> int | None:
        """How many collectives of a group this rank has called; None if that is not known.

        The recorder forgets its oldest entries, so a group it does not have may have been used.
        """
        if "collectives" not in (self.where or self.meta):
            return None
        if group in self.collectives:
            return int(self.collectives[group]["seq"])
        forgetful = sum(entry["seq"] for entry in self.collectives.values()) >= _RECORDED
        return None if forgetful else 0

    @property
    def open_collectives(self) -> dict[str, dict[str, Any]]:
        """Those of them that had not completed."""
        return {name: entry for name, entry in self.collectives.items() if not entry["retired"]}


def culprit(outcomes: Mapping[int, Outcome]) -> tuple[int, str]:
    """The rank at fault and a headline that says why; `outcomes` has every rank of the call."""
    every = list(outcomes.values())
    causes = sorted((o for o in every if o.failed and not o.consequence), key=lambda o: o.at)
    mismatch = _mismatch(every)
    if mismatch and all(_SIZES.search(o.meta.get("message", "")) for o in causes):
        return mismatch
    if causes:
        return _sent_too_much(every) or (causes[0].rank, headline(causes[0], len(every)))
    return _left(every) or _named_by_barrier(every) or _late(every) or _nobody(every)


def headline(outcome: Outcome, nprocs: int) -> str:
    """One line: what this rank failed of."""
    who = f"rank {outcome.rank} of {nprocs}"
    if outcome.kind == "died":
        return f"{who} {death(outcome.code)}"
    name, message = outcome.meta["error"], outcome.meta["message"].strip()
    if len(message) > _MESSAGE_CHARS:
        message = message[:_MESSAGE_CHARS] + " ..."  # the traceback below has it all
    return f"{who} raised {name}{': ' + message if message else ''}"


def death(code: int) -> str:
    """In words, how a process ended: status `code`, or signal `-code`."""
    if code == LOST:
        return (
            "closed or broke its connection to the notebook, as os.closerange, os.exec and writing "
            "to a descriptor it did not open do; its process still ran"
        )
    if code >= 0:
        return f"ended its process with status {code} before it returned, as os._exit does"
    name = signal.Signals(-code).name
    hint = {
        "SIGKILL": ", as the kernel does to a process when memory runs out",
        "SIGSEGV": ", a bad memory access in native code",
    }.get(name, "")
    return f"was killed by signal {name}{hint}"


def is_left_alone(waiting: Outcome, returned: Sequence[Outcome]) -> bool:
    """Whether `waiting` is in a collective that a member which has returned never called."""
    for name, entry in waiting.open_collectives.items():
        for gone in returned:
            called = gone.calls_of(name)
            if gone.rank in entry["ranks"] and called is not None and called < entry["seq"]:
                return True
    return False


def explains(outcome: Outcome) -> bool:
    """Whether this failure says who is at fault: it is a cause, or it names a rank."""
    return not outcome.consequence or bool(_BARRIER.search(outcome.meta["message"]))


def _left(every: list[Outcome]) -> tuple[int, str] | None:
    """The first rank that returned while another did not."""
    returned = sorted((o for o in every if o.kind == "returned"), key=lambda o: o.at)
    if not returned:
        return None
    left = [o for o in every if o.kind != "returned"]
    first = next((o for o in returned if any(is_left_alone(w, [o]) for w in left)), returned[0])
    waited = "" if all(o.kind == "waiting" and not _blocked(o) for o in left) else " waited for it"
    if not waited:
        return left[
            0
        ].rank, f"{_ranks(left)} was still running when {_ranks(returned)} had returned"
    return first.rank, f"rank {first.rank} of {len(every)} returned while {_ranks(left)}{waited}"


def _mismatch(every: list[Outcome]) -> tuple[int, str] | None:
    """Ranks whose newest collective of one group has the same number but is another call."""
    for name in sorted({name for o in every for name in o.collectives}):
        seen = {o.rank: o.collectives[name] for o in every if name in o.collectives}
        calls = {rank: _call(entry) for rank, entry in seen.items()}
        if len({entry["seq"] for entry in seen.values()}) == 1 and len(set(calls.values())) > 1:
            counts = list(calls.values())
            odd = min(calls, key=lambda rank: (counts.count(calls[rank]), -rank))
            said = "; ".join(f"rank {rank} called {call}" for rank, call in calls.items())
            return odd, f"ranks disagree about collective number {seen[odd]['seq']}: {said}"
    return None


def _sent_too_much(every: list[Outcome]) -> tuple[int, str] | None:
    """Gloo aborts the rank that receives more than it expects, and not the one that sends it.

    Where the others disagree about sizes, the one with the most sent it; else the dead one, whose
    own call nobody can ask for, differs from all.
    """
    dead = next((o for o in every if o.kind == "died" and _ABORTED.search(o.last_words)), None)
    if dead is None:
        return None
    got, expected = _ABORTED.search(dead.last_words).groups()  # type: ignore[union-attr]
    newest = {o.rank: e for o in every for e in o.collectives.values()}
    calls = {rank: _call(entry) for rank, entry in newest.items()}
    elements = {rank: sum(map(math.prod, entry["sizes"])) for rank, entry in newest.items()}
    differ = len(set(calls.values())) > 1
    culprit = max(elements, key=lambda rank: elements[rank]) if differ else dead.rank
    said = "; ".join(f"rank {rank} called {call}" for rank, call in calls.items())
    return culprit, (
        f"ranks disagree about the size of a collective: rank {dead.rank} expected {expected} "
        f"bytes, got {got}, and gloo ended it; {said}; debug=True compares the calls of all ranks"
    )


def _call(entry: dict[str, Any]) -> str:
    name = entry["name"]
    if name not in _EVEN:
        return f"{name}(...)"  # sizes may differ between ranks by right
    sizes = ", ".join("x".join(map(str, size)) or "scalar" for size in entry["sizes"])
    return f"{name}({sizes} {'/'.join(sorted(set(entry['dtypes'])))})"


def _named_by_barrier(every: list[Outcome]) -> tuple[int, str] | None:
    for outcome in every:
        found = _BARRIER.search(outcome.meta.get("message", ""))
        if found:
            named = int(found.group(1))
            return named, f"rank {named} of {len(every)} did not reach the barrier in time"
    return None


def _blocked(outcome: Outcome) -> bool:
    """Whether a rank waits for another one, as far as its stack and its collectives tell."""
    return bool(outcome.where.get("inside") or outcome.open_collectives)


def _late(every: list[Outcome]) -> tuple[int, str] | None:
    """The rank that was elsewhere, or the fewest collectives in, while the others waited."""
    elsewhere = [o for o in every if o.kind == "waiting" and not _blocked(o)]
    if elsewhere and len(elsewhere) < len(every):
        who, others = elsewhere[0], [o for o in every if o not in elsewhere]
        return (
            who.rank,
            f"rank {who.rank} of {len(every)} did not come while {_ranks(others)} waited",
        )
    for name in sorted({name for o in every for name in o.collectives}):
        counts = {o.rank: o.collectives[name]["seq"] for o in every if name in o.collectives}
        behind = min(counts, key=lambda rank: counts[rank])
        if len(set(counts.values())) > 1:
            return behind, (
                f"rank {behind} of {len(every)} is at collective number {counts[behind]}, "
                f"others are at number {max(counts.values())}"
            )
    return None


def _nobody(every: list[Outcome]) -> tuple[int, str]:
    failed = sorted((o for o in every if o.failed), key=lambda o: o.at)
    if failed:
        return failed[0].rank, headline(failed[0], len(every))
    if any(_blocked(o) for o in every):
        return every[0].rank, f"{_ranks(every)} waited for each other"
    return every[0].rank, f"{_ranks(every)} were still running"


def _ranks(outcomes: Sequence[Outcome]) -> str:
    ranks = [str(o.rank) for o in outcomes]
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return "ranks " + ", ".join(ranks[:-1]) + f" and {ranks[-1]}"
