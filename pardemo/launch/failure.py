"""Which rank was at fault, and how to say it.

When one rank fails, the others fail too: their connections break. The first report to arrive, and
even the earliest in time, is often such a consequence. So all reports are collected for a moment,
and the cause is looked for in this order: an error that is not about a connection, or a process that
died; a rank that returned while others waited for it; ranks that were running different collectives;
a rank that was elsewhere while the others waited.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_CONSEQUENCE = re.compile(
    r"connection (closed|reset|refused|was (closed|reset))|broken pipe|timed? ?out|timeout"
    r"|remote process exited|socket (is )?closed|pair closure|failed to recv|gloo.*transport"
    r"|monitoredBarrier|communicator was aborted|ncclRemoteError|store (is )?not available",
    re.IGNORECASE | re.DOTALL,
)
_BARRIER = re.compile(r"Rank (\d+) failed to pass monitoredBarrier", re.IGNORECASE)


class RankFailed(Exception):
    """A rank failed. `rank` is the one at fault, `ranks` says of every rank what became of it."""

    def __init__(self, message: str, rank: int, ranks: Mapping[int, str]) -> None:
        super().__init__(message)
        self.rank = rank
        self.ranks = dict(ranks)

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the rank's traceback is the news, this package's frames are not."""
        return [f"{type(self).__name__}: {self}"]


class RankTimeout(RankFailed):
    """The ranks had not returned after `timeout` seconds; the message shows every rank's stack."""


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

    @property
    def failed(self) -> bool:
        """Raised or died."""
        return self.kind in ("raised", "died")

    @property
    def consequence(self) -> bool:
        """Whether this is how a failure elsewhere looks from this rank."""
        if self.kind != "raised":
            return False
        return any(
            is_runtime and _CONSEQUENCE.search(message) is not None
            for _, is_runtime, message in self.meta["chain"]
        )

    @property
    def collectives(self) -> dict[str, dict[str, Any]]:
        """The newest collective of this rank in each process group."""
        found: dict[str, dict[str, Any]] = (self.where or self.meta).get("collectives", {})
        return found


def culprit(outcomes: Mapping[int, Outcome]) -> tuple[int, str]:
    """The rank at fault and the headline that says why.

    `outcomes` has every rank of the group; at least one has failed or time is up.
    """
    every = list(outcomes.values())
    causes = [o for o in every if o.failed and not o.consequence]
    if causes:
        first = min(causes, key=lambda o: o.at)
        return first.rank, headline(first)
    named = _named_by_barrier(every)
    returned = sorted((o for o in every if o.kind == "returned"), key=lambda o: o.at)
    if returned:
        left = [o for o in every if o.kind != "returned"]
        doing = _doing(left[0]) if left else ""
        return returned[0].rank, (
            f"rank {returned[0].rank} returned while {_ranks([o.rank for o in left])} still "
            f"waited{' in ' + doing if doing else ''}"
        )
    mismatch = _mismatch(every)
    if mismatch:
        return mismatch
    if named is not None:
        return named, f"rank {named} did not reach the barrier in time"
    elsewhere = [o for o in every if o.kind == "waiting" and not o.where.get("inside")]
    if elsewhere and len(elsewhere) < len(every):
        return elsewhere[0].rank, f"rank {elsewhere[0].rank} did not come while the others waited"
    failed = sorted((o for o in every if o.failed), key=lambda o: o.at)
    if failed:
        return failed[0].rank, headline(failed[0])
    return every[0].rank, f"{_ranks([o.rank for o in every])} waited for each other"


def headline(outcome: Outcome) -> str:
    """One line: what this rank failed of."""
    if outcome.kind == "died":
        return f"rank {outcome.rank} {_death(outcome.code)}"
    name, message = outcome.meta["error"], outcome.meta["message"]
    return f"rank {outcome.rank} raised {name}{': ' + message if message else ''}"


def _death(code: int) -> str:
    if code >= 0:
        return f"ended its process with status {code} before it returned (os._exit?)"
    name = signal.Signals(-code).name
    hint = {
        "SIGKILL": ", as the kernel does to a process when memory runs out",
        "SIGSEGV": ", a bad memory access in native code",
    }.get(name, "")
    return f"was killed by signal {name}{hint}"


def _named_by_barrier(every: list[Outcome]) -> int | None:
    for outcome in every:
        found = (
            _BARRIER.search(outcome.meta.get("message", "")) if outcome.kind == "raised" else None
        )
        if found:
            return int(found.group(1))
    return None


def _mismatch(every: list[Outcome]) -> tuple[int, str] | None:
    """Ranks whose newest collective of one group has the same number but is another call."""
    groups = {name for o in every for name in o.collectives}
    for name in sorted(groups):
        seen = {o.rank: o.collectives[name] for o in every if name in o.collectives}
        calls = {rank: _call(entry) for rank, entry in seen.items()}
        if len({entry["seq"] for entry in seen.values()}) == 1 and len(set(calls.values())) > 1:
            counts = list(calls.values())
            odd = min(calls, key=lambda rank: (counts.count(calls[rank]), -rank))
            said = "; ".join(f"rank {rank} called {call}" for rank, call in calls.items())
            number = seen[odd]["seq"]
            return odd, f"ranks disagree about collective number {number}: {said}"
    return None


def _call(entry: dict[str, Any]) -> str:
    sizes = ", ".join("x".join(map(str, size)) or "scalar" for size in entry["sizes"])
    return f"{entry['name']}({sizes} {'/'.join(sorted(set(entry['dtypes'])))})"


def _doing(outcome: Outcome) -> str:
    return str(outcome.where.get("inside") or "")


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return "ranks " + ", ".join(map(str, ranks[:-1])) + f" and {ranks[-1]}"
