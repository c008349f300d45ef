"""From profiler events to the spans of one rank's lane: intervals, and what each one was.

On a CPU, gloo's work appears on worker threads as "gloo:all_reduce" and so on, and what the rank's
own thread does as operators. A receive begins when it is posted, so it holds the wait for its
sender. On a GPU, kernels carry the time: names with nccl are communication, and the others belong
to the phase of the operator that launched them (matched by correlation).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

Interval = tuple[float, float]

COMPUTATION = ("forward", "backward", "optimizer")
TRANSFERS = ("send", "recv", "copy")
_GAP_S = 1e-4  # a pause between operators shorter than this is Python, not idleness


@dataclass(frozen=True)
class Event:
    """One profiler event, in seconds; `thread` is the profiler's number of it."""

    name: str
    start_s: float
    end_s: float
    thread: int
    on_gpu: bool = False
    correlation: int = 0

    def shifted(self, by_s: float) -> Event:
        """The same on a clock that starts elsewhere."""
        return replace(self, start_s=self.start_s + by_s, end_s=self.end_s + by_s)


@dataclass(frozen=True)
class Span:
    """What one rank did from `start_s` to `end_s`: kind as in a figure, name as in the trace."""

    rank: int
    kind: str
    start_s: float
    end_s: float
    name: str = ""

    @property
    def is_communication(self) -> bool:
        """A collective or a transfer."""
        return self.kind in ("collective", "transfer")

    @property
    def is_computation(self) -> bool:
        """Forward, backward or optimizer."""
        return self.kind in COMPUTATION


def event(raw: Any) -> Event:
    """From one of kineto's events (nanoseconds of the host's clock)."""
    start = raw.start_ns() / 1e9
    return Event(
        raw.name(),
        start,
        start + raw.duration_ns() / 1e9,
        raw.start_thread_id(),
        "CUDA" in str(raw.device_type()),
        raw.correlation_id(),
    )


def lane(rank: int, events: Sequence[Event], end_s: float) -> list[Span]:
    """The spans of one rank from 0 to `end_s`: communication, computation by phase, and idle."""
    moving = [span for e in events if (span := _communication(rank, e)) is not None]
    on_gpu = any(e.on_gpu for e in events)
    phases = _phases(events)
    work = _kernels(events, phases) if on_gpu else _operators(events, phases)
    spans = [
        Span(rank, kind, start, end, kind)
        for kind, intervals in work.items()
        for start, end in union(intervals, _GAP_S)
    ]
    busy = union([(s.start_s, s.end_s) for s in (*spans, *moving)], _GAP_S)
    idle = [Span(rank, "idle", a, b, "idle") for a, b in gaps(busy, 0.0, end_s)]
    return sorted((*spans, *moving, *idle), key=lambda span: span.start_s)


def _communication(rank: int, e: Event) -> Span | None:
    """A span for gloo's and nccl's own work, by whatever name; None for everything else."""
    lowered = e.name.lower()
    if lowered.startswith("gloo:"):
        name = lowered.removeprefix("gloo:")
    elif e.on_gpu and "nccl" in lowered:
        name = lowered.removeprefix("ncclkernel_").removeprefix("nccldevkernel_").split("_")[0]
    elif e.on_gpu and lowered.startswith("memcpy"):
        name = "copy"
    else:
        return None
    if name == "barrier":
        return None
    kind = "transfer" if name in TRANSFERS or "sendrecv" in name else "collective"
    return Span(rank, kind, e.start_s, e.end_s, name)


def _phases(events: Iterable[Event]) -> dict[str, list[Interval]]:
    """When autograd ran a graph, and when an optimizer stepped."""
    found: dict[str, list[Interval]] = {"backward": [], "optimizer": []}
    for e in events:
        if e.name.startswith("autograd::engine::evaluate_function"):
            found["backward"].append((e.start_s, e.end_s))
        elif e.name.startswith("Optimizer.step#"):
            found["optimizer"].append((e.start_s, e.end_s))
    return {kind: union(intervals) for kind, intervals in found.items()}


def _operators(
    events: Sequence[Event], phases: dict[str, list[Interval]]
) -> dict[str, list[Interval]]:
    """Operators of the rank's own thread by phase; time between them it waited, or ran Python.

    Not the phases' whole length: DDP waits for its last bucket inside the backward.
    """
    main = _main_thread(events)
    work: dict[str, list[Interval]] = {kind: [] for kind in COMPUTATION}
    for e in events:
        if e.thread == main and not e.on_gpu and e.name.startswith("aten::"):
            work[_phase_at(e.start_s, phases)].append((e.start_s, e.end_s))
    return {kind: union(intervals) for kind, intervals in work.items()}


def _phase_at(at_s: float, phases: dict[str, list[Interval]]) -> str:
    """The phase that holds this moment; forward where neither of the others does."""
    inside = (kind for kind, ranges in phases.items() if any(a <= at_s < b for a, b in ranges))
    return next(inside, "forward")


def _kernels(
    events: Sequence[Event], phases: dict[str, list[Interval]]
) -> dict[str, list[Interval]]:
    """Kernels by the phase in which the host launched them."""
    launched = {e.correlation: e.start_s for e in events if not e.on_gpu and e.correlation}
    work: dict[str, list[Interval]] = {kind: [] for kind in COMPUTATION}
    for e in events:
        lowered = e.name.lower()
        if not e.on_gpu or "nccl" in lowered or lowered.startswith(("memcpy", "memset")):
            continue
        at = launched.get(e.correlation, e.start_s)
        work[_phase_at(at, phases)].append((e.start_s, e.end_s))
    return {kind: union(intervals) for kind, intervals in work.items()}


def _main_thread(events: Sequence[Event]) -> int:
    """The thread that ran most operators: a rank's own."""
    counts: dict[int, int] = {}
    for e in events:
        if e.name.startswith("aten::") and not e.on_gpu:
            counts[e.thread] = counts.get(e.thread, 0) + 1
    return max(counts, key=lambda thread: counts[thread], default=0)


def union(intervals: Iterable[Interval], bridge_s: float = 0.0) -> list[Interval]:
    """Disjoint intervals in order; pauses up to `bridge_s` are closed."""
    out: list[Interval] = []
    for start, end in sorted(intervals):
        if out and start <= out[-1][1] + bridge_s:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def overlap(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """Where both are."""
    found = ((max(s, t), min(e, f)) for s, e in a for t, f in b)
    return union((start, end) for start, end in found if start < end)


def gaps(busy: Sequence[Interval], start_s: float, end_s: float) -> list[Interval]:
    """What is left between the busy intervals of [start, end]."""
    out, at = [], start_s
    for start, end in busy:
        if start > at:
            out.append((at, start))
        at = max(at, end)
    if end_s > at:
        out.append((at, end_s))
    return out


def total(intervals: Iterable[Interval]) -> float:
    """Summed length in seconds."""
    return sum(end - start for start, end in intervals)
