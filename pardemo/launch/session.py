"""One group of ranks and its calls: start them, send a function, end them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pardemo.launch import family, inside, pickling, rendezvous, servers, watch
from pardemo.launch.failure import Outcome, RankFailed
from pardemo.launch.follow import Follow
from pardemo.launch.group import Group
from pardemo.launch.output import Output

_START_S = 120.0
_START_EACH_S = 10.0
_GROUP_EXTRA_S = 30.0  # torch's own timeout comes after ours, which shows the stacks
_NO_LIMIT_S = 7 * 86400.0


@dataclass(frozen=True)
class Setup:
    """How ranks are set up; the arguments of `launch`."""

    nprocs: int
    threads: int = 1
    timeout: float | None = 60.0
    start: str | Callable[[int], servers.Started] = "forkserver"
    backend: str = "gloo"
    seed: int | None = 0
    env: dict[str, str] = field(default_factory=dict)
    debug: bool = False
    rank_env: Sequence[dict[str, str]] = ()  # what one rank alone is told, by rank


class Session:
    """A live group; once a call has failed or was stopped, it is over."""

    def __init__(self, setup: Setup, echo: bool) -> None:
        self.setup = setup
        self.output = Output(setup.nprocs, echo)
        self.calls = 0
        self.group: Group | None = None
        self.store: Any = None
        limit = _START_S + _START_EACH_S * setup.nprocs
        if not callable(setup.start):  # else ranks start elsewhere
            rendezvous.check_loopback()
        if setup.start == "forkserver":
            servers.fork_server().wait_ready()
        try:
            self.store = rendezvous.open_store(limit)
            self.group = Group(setup.nprocs, setup.start)
            self._send_setup(self.store.port)
            self._follow(self.group, range(setup.nprocs), "ready", limit)
        except BaseException:
            self.close()
            raise

    def _send_setup(self, port: int) -> None:
        setup = self.setup
        group_timeout = (setup.timeout or _NO_LIMIT_S) + _GROUP_EXTRA_S
        self._group.limit_sends(setup.timeout or _NO_LIMIT_S)
        for rank in range(setup.nprocs):
            own = rendezvous.environment(rank, setup.nprocs, setup.threads, port, setup.debug)
            own |= setup.rank_env[rank] if setup.rank_env else {}
            self._group.send(
                rank,
                "setup",
                environ={**os.environ, **own, **setup.env, family.MARK: self._group.mark},
                cwd=os.getcwd(),
                path=list(sys.path),
                argv=list(sys.argv),
                threads=setup.threads,
                seed=setup.seed,
                backend=setup.backend,
                group_timeout=group_timeout,
            )

    @property
    def _group(self) -> Group:
        if self.group is None:
            raise RuntimeError("these ranks have ended")
        return self.group

    @property
    def alive(self) -> bool:
        """Whether another call can be made."""
        return self.group is not None and self.group.alive

    def call(
        self, fn: Any, args: Any, kwargs: Any, last: bool, only: list[int] | None = None
    ) -> dict[int, Any]:
        """Run `fn` on the ranks; their values by rank.

        RankFailed when a rank fails; the group is over then.
        """
        call = (fn, args, kwargs)
        with watch.interrupts_allowed():
            parts, sources = pickling.pack(call, f"the call of {getattr(fn, '__name__', fn)}")
            warning = pickling.size_warning(call, parts)
        if warning:
            print(f"note: {warning}", file=sys.stderr)
        ranks = list(range(self.setup.nprocs)) if only is None else only
        self.calls += 1
        try:
            began = time.monotonic()
            taken = True
            for rank in ranks:
                head = {"call": self.calls, "sources": sources, "last": last}
                with watch.interrupts_allowed():
                    taken = self._group.send(rank, "call", parts, **head) and taken
            start = time.monotonic() if taken else began  # one that takes nothing has had its time
            outcomes = self._follow(self._group, ranks, "returned", self.setup.timeout, start)
        except BaseException:
            self.close()
            raise
        with watch.interrupts_allowed():
            return {rank: _value(outcomes[rank]) for rank in ranks}

    def _follow(
        self,
        group: Group,
        ranks: Iterable[int],
        goal: str,
        timeout: float | None,
        began: float | None = None,
    ) -> dict[int, Outcome]:
        follow = Follow(group, self.output, list(ranks), self.calls, goal, timeout, began)
        try:
            return follow.run()
        except KeyboardInterrupt:
            print(follow.stopped(), file=sys.stderr)
            raise

    def close(self) -> None:
        """Kill the ranks and free what they used."""
        with watch.interrupts_held():
            if self.group is not None:
                self.group.kill()
                self.group = None
            self.output.flush()
            self.store = None


def _value(outcome: Outcome) -> Any:
    try:
        return pickling.unpack(outcome.body or [])
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the learner's class does, SystemExit too
        said = f"{type(error).__name__}: {inside.safe_text(error)}"
        text = f"the value of rank {outcome.rank} cannot be read here: {said}"
        raise RankFailed(text, outcome.rank, {outcome.rank: text}) from error
