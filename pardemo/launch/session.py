"""One group of ranks and its calls: send a function, follow the ranks, decide how it ended."""

from __future__ import annotations

import os
import queue
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from pardemo.launch import pickling, rendezvous, story
from pardemo.launch.failure import Outcome, RankFailed
from pardemo.launch.group import Event, Group
from pardemo.launch.output import Output

GRACE_S = 0.5
_UNRESOLVED_S = 3.0
_ASK_S = 0.5
_START_S = 120.0


@dataclass(frozen=True)
class Setup:
    """How ranks are set up; the arguments of `launch`."""

    nprocs: int
    threads: int = 1
    timeout: float | None = 60.0
    start: str = "forkserver"
    backend: str = "gloo"
    seed: int | None = 0
    env: dict[str, str] = field(default_factory=dict)
    debug: bool = False


class Session:
    """A live group; once a call has failed or was stopped, it is over."""

    def __init__(self, setup: Setup, echo: bool) -> None:
        began = time.monotonic()
        self.setup = setup
        self.output = Output(setup.nprocs, echo)
        self.calls = 0
        limit = _START_S + 10.0 * setup.nprocs
        self.group_timeout = (setup.timeout or 86400.0) + 30.0
        self.store: dist.TCPStore | None = rendezvous.open_store(limit)
        self.group = Group(setup.nprocs, setup.start)
        try:
            self._send_setup(self.store.port)
            self._follow(list(range(setup.nprocs)), 0, "ready", limit, {})
        except BaseException:
            self.close()
            raise
        self.ready_s = time.monotonic() - began

    def _send_setup(self, port: int) -> None:
        setup = self.setup
        for rank in range(setup.nprocs):
            own = rendezvous.environment(rank, setup.nprocs, setup.threads, port, setup.debug)
            self.group.send(
                rank,
                "setup",
                environ={**os.environ, **own, **setup.env},
                cwd=os.getcwd(),
                path=list(sys.path),
                argv=list(sys.argv),
                threads=setup.threads,
                seed=setup.seed,
                backend=setup.backend,
                group_timeout=self.group_timeout,
            )

    @property
    def alive(self) -> bool:
        """Whether another call can be made."""
        return self.group.alive

    def call(
        self, fn: Any, args: Any, kwargs: Any, last: bool, only: list[int] | None = None
    ) -> dict[int, Any]:
        """Run `fn` on the ranks and return their values by rank; RankFailed, and over, if one fails."""
        what = f"the call of {getattr(fn, '__name__', type(fn).__name__)}"
        call = (fn, args, kwargs)
        parts, sources = pickling.pack(call, what)
        warning = pickling.size_warning(call, parts)
        if warning:
            print(f"note: {warning}", file=sys.stderr)
        ranks = list(range(self.setup.nprocs)) if only is None else only
        self.calls += 1
        try:
            for rank in ranks:
                self.group.send(rank, "call", parts, call=self.calls, sources=sources, last=last)
            outcomes = self._follow(ranks, self.calls, "returned", self.setup.timeout, sources)
        except BaseException:
            self.close()
            raise
        return {rank: _value(outcomes[rank]) for rank in ranks}

    def close(self) -> None:
        """Kill the ranks and free what they used."""
        self.group.kill()
        self.output.flush()
        self.store = None

    def _follow(
        self, ranks: list[int], call: int, goal: str, timeout: float | None, sources: Any
    ) -> dict[int, Outcome]:
        """Take events until every rank reached the goal; raises when one cannot."""
        began = time.monotonic()
        deadline = None if timeout is None else began + timeout
        outcomes = {rank: Outcome(rank) for rank in ranks}
        verdict_at: float | None = None
        while any(o.kind == "waiting" for o in outcomes.values()):
            end = min(t for t in (deadline, verdict_at, began + 1e9) if t is not None)
            left = end - time.monotonic()
            if left <= 0:
                break
            event = self._next(min(left, 3600.0))
            if event is None:
                continue
            self._take(event, outcomes, call, goal)
            failed = [o for o in outcomes.values() if o.failed]
            if failed and verdict_at is None:
                verdict_at = time.monotonic() + GRACE_S
        if all(o.kind == "returned" for o in outcomes.values()):
            self.output.flush()
            return outcomes
        timed_out = not any(o.failed for o in outcomes.values())
        self._ask(outcomes, call, goal)
        self.output.flush()
        labels = cell_labels(sources)
        raise story.failure(outcomes, began, labels, timeout if timed_out else None)

    def _next(self, timeout: float) -> Event | None:
        try:
            return self.group.events.get(timeout=timeout)
        except queue.Empty:
            return None

    def _take(self, event: Event, outcomes: dict[int, Outcome], call: int, goal: str) -> None:
        """Record one event."""
        if event.kind in ("out", "err"):
            self.output.put(event.rank, event.kind, event.value)
            return
        if event.kind == "error":
            raise RuntimeError(event.value)
        outcome = outcomes.get(event.rank)
        if outcome is None:
            return
        if event.kind == "stacks":
            outcome.dump += event.value.decode("utf-8", "replace")
        elif event.kind == "where":
            outcome.where = event.value
        elif event.kind == "exited" and outcome.kind == "waiting":
            outcome.kind, outcome.at, outcome.code = "died", time.monotonic(), event.value
        elif event.kind == goal and event.value.get("call", 0) == call:
            outcome.kind, outcome.at = "returned", event.value.get("at", time.monotonic())
            outcome.meta, outcome.body = event.value, event.body
        elif event.kind == "raised" and event.value["call"] == call:
            outcome.kind, outcome.at, outcome.meta = "raised", event.value["at"], event.value

    def _ask(self, outcomes: dict[int, Outcome], call: int, goal: str) -> None:
        """Ask the ranks that still wait where they are; a C-level dump for those that cannot say."""
        silent = [o for o in outcomes.values() if o.kind == "waiting"]
        for ask in ("where", "dump"):
            for outcome in silent:
                if ask == "where":
                    self.group.send(outcome.rank, "where")
                else:
                    self.group.signal(outcome.rank, signal.SIGUSR1)
            until = time.monotonic() + _ASK_S
            while silent and time.monotonic() < until:
                event = self._next(max(0.001, until - time.monotonic()))
                if event is not None:
                    self._take(event, outcomes, call, goal)
                silent = [o for o in silent if not o.where and not o.dump and o.kind == "waiting"]


def _value(outcome: Outcome) -> Any:
    try:
        return pickling.unpack(outcome.body or [])
    except Exception as error:
        text = f"the value of rank {outcome.rank} cannot be read here: {error}"
        raise RankFailed(text, outcome.rank, {outcome.rank: text}) from error


def cell_labels(sources: dict[str, list[str]]) -> dict[str, str]:
    """For each file name of a cell, what the notebook calls it: `Cell In[3]`."""
    try:
        from IPython import get_ipython
    except ImportError:
        return {}
    shell = get_ipython()
    numbers = getattr(getattr(shell, "compile", None), "_filename_map", {})
    return {name: f"Cell In[{numbers[name]}]" for name in sources if name in numbers}
