"""Following one call: take what the ranks say until all have returned or one cannot any more."""

from __future__ import annotations

import queue
import signal
import time

from pardemo.launch import failure, story, watch
from pardemo.launch.failure import Outcome
from pardemo.launch.group import Event, Group
from pardemo.launch.live import Live
from pardemo.launch.output import Output

GRACE_S = 0.5  # after the first failure, for the others to report theirs
UNEXPLAINED_S = 3.0  # the same while every failure so far looks like a consequence
END_S = 5.0  # for the fork server to say what a rank died of
DYING_S = 1.0  # a process that is killed may have closed its files and still count as running
ASK_S = 0.5  # for a rank to say where it is
LOOK_S = 1.0  # between two looks at ranks that still run when others have returned
_LONGEST_WAIT_S = 3600.0


class Follow:
    """One call on some ranks of a group, from its sending to its verdict.

    `goal` is the message that ends a rank's part: "ready" for the start, "returned" for a call.
    """

    def __init__(
        self,
        group: Group,
        output: Output,
        ranks: list[int],
        call: int,
        goal: str,
        timeout: float | None,
        began: float | None = None,
    ) -> None:
        self.group, self.output = group, output
        self.call, self.goal, self.timeout = call, goal, timeout
        self.outcomes = {rank: Outcome(rank) for rank in ranks}
        self.live = Live(len(ranks))
        self.began = time.monotonic() if began is None else began

    def run(self) -> dict[int, Outcome]:
        """The outcomes once every rank has returned; RankFailed or RankTimeout otherwise."""
        deadline = None if self.timeout is None else self.began + self.timeout
        verdict_at: float | None = None
        look_at = self.began + LOOK_S
        while self.waiting:
            now = time.monotonic()
            if deadline is not None and now >= deadline and verdict_at is None:
                raise self._failure(self.timeout)
            if verdict_at is not None and now >= verdict_at:
                break
            if now >= look_at:
                look_at = now + LOOK_S
                if verdict_at is None and self._someone_left():
                    break
            ends = [t for t in (deadline, verdict_at, look_at) if t is not None and t > now]
            with watch.interrupts_allowed():
                self.take(self.next(min([*(t - now for t in ends), _LONGEST_WAIT_S])))
            verdict_at = self._verdict_at(verdict_at)
        if any(o.kind != "returned" for o in self.outcomes.values()):
            raise self._failure(None)
        self.live.finish()
        self.output.flush()
        return self.outcomes

    @property
    def waiting(self) -> list[Outcome]:
        """The ranks that have neither returned nor failed."""
        return [o for o in self.outcomes.values() if o.kind == "waiting"]

    def _verdict_at(self, before: float | None) -> float | None:
        """When to stop waiting for more reports: soon after a cause, later without one."""
        failed = [o for o in self.outcomes.values() if o.failed]
        if not failed:
            return None
        returned = any(o.kind == "returned" for o in self.outcomes.values())
        explained = returned or any(failure.explains(o) for o in failed)
        first = before if before is not None else time.monotonic() + UNEXPLAINED_S
        return min(first, time.monotonic() + GRACE_S) if explained else first

    def _someone_left(self) -> bool:
        """Whether a rank waits in a collective that a rank that has returned never called."""
        if len(self.waiting) == len(self.outcomes):
            return False
        asked = [o for o in self.outcomes.values() if "collectives" not in o.meta]
        self.ask(asked, ASK_S)
        left = [o for o in self.outcomes.values() if o.kind == "returned"]
        return any(failure.is_left_alone(o, left) for o in self.waiting)

    def _await_ends(self) -> None:
        """A rank that cannot be talked to has often ended: then wait to hear of what."""
        began = time.monotonic()
        lost = [o for o in self.outcomes.values() if o.lost]
        while (passed := time.monotonic() - began) < END_S:
            mute = [o for o in lost if o.lost]
            if passed >= DYING_S:
                mute = [o for o in mute if self.group.state(o.rank) in ("", "X", "Z")]
            if not mute:
                break
            self.take(self.next(0.05))

    def _failure(self, timeout: float | None) -> failure.RankFailed:
        self._await_ends()
        self.ask(self.waiting, ASK_S, dump=True)
        self.live.finish("failed")
        self.output.flush()
        return story.failure(self.outcomes, self.began, timeout, self.goal == "ready")

    def stopped(self) -> str:
        """After the stop button: where every rank was."""
        self.ask(self.waiting, ASK_S / 2)
        self.live.finish("stopped")
        self.output.flush()
        return story.stopped(self.outcomes)

    def ask(self, asked: list[Outcome], seconds: float, dump: bool = False) -> None:
        """Ask ranks where they are; with `dump`, a C-level stack of those that cannot say."""
        for outcome in asked:
            outcome.where = {}
            self.group.ask(outcome.rank)
        self._await_answers(asked, seconds)
        silent = [o for o in asked if not o.where and o.kind == "waiting"]
        if dump and silent:
            for outcome in silent:
                outcome.state = self.group.state(outcome.rank)
                self.group.signal(outcome.rank, signal.SIGUSR1)
            self._await_answers(silent, seconds / 2)

    def _await_answers(self, asked: list[Outcome], seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if all(o.where or o.dump or o.failed for o in asked):
                break
            self.take(self.next(max(0.001, end - time.monotonic())))

    def next(self, timeout: float) -> Event | None:
        """The next event, or None if there is none in time."""
        try:
            return self.group.events.get(timeout=timeout)
        except queue.Empty:
            return None

    def take(self, event: Event | None) -> None:
        """Record one event."""
        if event is None:
            return
        if event.kind in ("out", "err"):
            self.live.clear()
            self.output.put(event.rank, event.kind, event.value)
        elif event.kind == "report":
            self.live.update(event.rank, event.value["values"])
        elif event.kind == "error":
            raise RuntimeError(event.value)
        elif event.rank in self.outcomes:
            self._record(self.outcomes[event.rank], event)

    def _record(self, outcome: Outcome, event: Event) -> None:
        if event.kind == "stacks":
            outcome.dump += event.value.decode("utf-8", "replace")
        elif event.kind == "where":
            outcome.where = event.value
        elif outcome.kind != "waiting" and not (event.kind == "exited" and outcome.lost):
            return
        elif event.kind == "lost":
            outcome.kind, outcome.at, outcome.code = "died", time.monotonic(), failure.LOST
        elif event.kind == "exited":
            outcome.kind, outcome.at, outcome.code = "died", time.monotonic(), event.value
            outcome.last_words = self.output.tail(outcome.rank)
        elif event.kind in (self.goal, "raised") and event.value["call"] == self.call:
            outcome.kind = "raised" if event.kind == "raised" else "returned"
            outcome.at, outcome.meta, outcome.body = event.value["at"], event.value, event.body
