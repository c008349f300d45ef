"""timeline(): one step of all ranks on one clock, from torch.profiler's traces.

Ranks of one host share the clock, so their traces are merged as they are. A span is what a rank's
lane shows: forward, backward, optimizer, each collective or transfer, and idle where nothing ran.
Profiling slows a step down: read the order and the proportions, not the milliseconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pardemo.launch import Ranks
from pardemo.measure import spans as reading
from pardemo.measure.inside import Case
from pardemo.measure.spans import Event, Span
from pardemo.measure.timing import milliseconds
from pardemo.measure.traffic import Counting


class NothingFound(RuntimeError):
    """A trace without the collectives that ran: a renamed kernel, not a free collective."""


@dataclass(frozen=True)
class Timeline:
    """Spans of every rank, in seconds from the start of the step; iterate over them to draw."""

    spans: tuple[Span, ...] = field(repr=False)
    ranks: int
    length_s: float
    label: str = ""
    events: tuple[tuple[Event, ...], ...] = field(default=(), repr=False)

    def __iter__(self) -> Iterator[Span]:
        return iter(self.spans)

    def seconds(self, rank: int, kind: str) -> float:
        """Time of one kind on one rank (overlapping spans of that kind count once)."""
        found = [s for s in self.spans if s.rank == rank and s.kind == kind]
        return reading.total(reading.union((s.start_s, s.end_s) for s in found))

    def hidden_s(self, rank: int) -> float:
        """Communication of one rank that ran beside its computation."""
        mine = [s for s in self.spans if s.rank == rank]
        moving = reading.union((s.start_s, s.end_s) for s in mine if s.is_communication)
        busy = reading.union((s.start_s, s.end_s) for s in mine if s.is_computation)
        return reading.total(reading.overlap(moving, busy))

    def save(self, path: str | Path) -> Path:
        """Write a Chrome trace (open it in ui.perfetto.dev or chrome://tracing): a process per
        rank, with a lane of spans and the profiler's own events below it."""
        rows: list[dict[str, Any]] = []
        for rank in range(self.ranks):
            rows.append({"ph": "M", "name": "process_name", "pid": rank,
                         "args": {"name": f"rank {rank}"}})  # fmt: skip
            spans = [s for s in self.spans if s.rank == rank]
            rows += [_row(s.name, s.kind, rank, 0, s.start_s, s.end_s) for s in spans]
            for event in self.events[rank] if self.events else ():
                rows.append(
                    _row(event.name, "event", rank, event.thread, event.start_s, event.end_s)
                )
        Path(path).write_text(json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"}))
        return Path(path)

    def __repr__(self) -> str:
        lines = [f"{self.label or 'one step'}, {milliseconds(self.length_s)} under the profiler"]
        for rank in range(self.ranks):
            kinds = dict.fromkeys(s.kind for s in self.spans if s.rank == rank)
            said = ", ".join(f"{k} {milliseconds(self.seconds(rank, k))}" for k in sorted(kinds))
            lines.append(f"  rank {rank}: {said}; hidden {milliseconds(self.hidden_s(rank))}")
        return "\n".join(lines)


def timeline(case: Case, *, ranks: Ranks | None = None, warmup: int = 3) -> Timeline:
    """Record one warm step of `case` on all its ranks.

    Raises NothingFound when a rank called collectives and its trace shows none of them: an empty
    lane must never be read as free communication.
    """
    with contextlib.ExitStack() as stack:
        if ranks is None:
            ranks = stack.enter_context(Ranks(case.ranks))
        if ranks.setup.nprocs != case.ranks:
            raise ValueError(f"a case of {case.ranks} ranks on a group of {ranks.setup.nprocs}")
        taken = list(ranks(_record, case, warmup))
    begin = min(events[0].start_s for events, *_ in taken)
    length = max(end_s for *_, end_s in taken) - begin
    spans: list[Span] = []
    merged = []
    for rank, (events, calls, _) in enumerate(taken):
        moved = tuple(event.shifted(-begin) for event in events)
        found = reading.lane(rank, moved, length)
        if calls and not any(span.is_communication for span in found):
            raise NothingFound(
                f"rank {rank} called {calls} collectives, and its trace shows none of them: "
                f"names seen are {sorted({event.name for event in events})[:20]}"
            )
        spans += found
        merged.append(moved)
    return Timeline(tuple(spans), case.ranks, length, case.label, tuple(merged))


def _record(case: Case, warmup: int) -> tuple[list[Event], int, float]:
    """Inside a rank: (events of one step, collectives it called, when it ended)."""
    from pardemo.measure import inside

    torch.set_num_threads(case.threads)
    step = case.make(inside._mesh(case))
    for _ in range(max(warmup - 1, 0)):
        step()
    with Counting() as counting:
        step()
    calls = sum(call.ranks > 1 and call.kind != "barrier" for call in counting.calls)
    inside._wait_for_all()
    with _without_chatter():
        recorder = profile(activities=_activities())
        recorder.__enter__()
        time.sleep(0.001)
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        end_s = time.time()
        recorder.__exit__(None, None, None)
    events = [reading.event(raw) for raw in recorder.profiler.kineto_results.events()]  # type: ignore[union-attr]
    return sorted(events, key=lambda e: e.start_s), calls, end_s


def _activities() -> list[ProfilerActivity]:
    gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return [ProfilerActivity.CPU, *gpu]


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """The profiler writes two lines to descriptor 2 when it starts and stops: drop them."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _row(
    name: str, kind: str, rank: int, thread: int, start_s: float, end_s: float
) -> dict[str, Any]:
    return {
        "ph": "X", "name": name, "cat": kind, "pid": rank, "tid": thread,
        "ts": start_s * 1e6, "dur": (end_s - start_s) * 1e6,
    }  # fmt: skip
