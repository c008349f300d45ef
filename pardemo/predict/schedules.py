"""Pipeline schedules, simulated tick by tick: who computes what when, and who waits.

A stage runs a fixed list of operations (F forward, B backward, W the weights' gradient where a
zero-bubble schedule splits it off). An operation starts when its rank is free and when what it
needs has arrived: F of the stage before, B of the stage after, plus a transfer time where they sit
on different ranks. The closed forms, (p-1)/(m+p-1) for one chunk per rank and (p-1)/(v m) of the
ideal time for v chunks, are tests of this simulator and nothing is computed from them.
Sources: Huang 2019 (GPipe), Narayanan 2021 (1F1B, interleaved), Qi 2023 (zero bubble, ZB-V).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pardemo.predict.orders import NAMES, Op, order_of, stage_map
from pardemo.predict.prediction import human


class ScheduleError(ValueError):
    """An order that cannot run: a deadlock, a repeated or a missing operation."""


@dataclass(frozen=True)
class Span:
    """One operation on the clock: `kind` F, B or W of `microbatch` at `stage` on `rank`."""

    rank: int
    stage: int
    microbatch: int
    kind: str
    start: float
    end: float

    def __repr__(self) -> str:
        return f"{self.kind}{self.microbatch}@stage{self.stage} {self.start:g}-{self.end:g}"


@dataclass(frozen=True)
class Schedule:
    """A simulated step: `spans` sorted by rank and start, `time` from first start to last end."""

    name: str
    ranks: int
    chunks: int
    microbatches: int
    spans: tuple[Span, ...]
    peak_activations: tuple[float, ...]

    @property
    def time(self) -> float:
        """From 0 to the end of the last operation, in the unit of the stage times."""
        return max(s.end for s in self.spans)

    @property
    def busy(self) -> tuple[float, ...]:
        """Time each rank computes."""
        out = [0.0] * self.ranks
        for s in self.spans:
            out[s.rank] += s.end - s.start
        return tuple(out)

    @property
    def bubble(self) -> float:
        """Share of all ranks' time in which they wait: 1 - busy / (ranks x time)."""
        return 1 - sum(self.busy) / (self.ranks * self.time)

    @property
    def overhead(self) -> float:
        """Waiting over computing: time / mean busy - 1; (p-1)/(v m) when stages are equal."""
        return self.time * self.ranks / sum(self.busy) - 1

    def on(self, rank: int) -> list[Span]:
        """The spans of one rank in order of time."""
        return sorted((s for s in self.spans if s.rank == rank), key=lambda s: s.start)

    def __repr__(self) -> str:
        chunks = f" x {self.chunks} chunks" if self.chunks > 1 else ""
        return (
            f"{self.name}, {self.ranks} ranks{chunks}, {self.microbatches} microbatches: "
            f"{self.time:.6g} ticks, bubble {100 * self.bubble:.1f} %, "
            f"peak activations {max(self.peak_activations):g} microbatches on a rank"
        )

    def chart(self, width: int = 100) -> str:
        """A picture in text: one line per rank, letters F B W, dots where it waits."""
        scale = min(width, max(1, round(self.time))) / self.time
        lines = []
        for rank in range(self.ranks):
            row = ["."] * max(1, round(self.time * scale))
            for s in self.on(rank):
                for i in range(round(s.start * scale), max(round(s.end * scale), 1)):
                    row[min(i, len(row) - 1)] = s.kind
            lines.append(f"rank {rank} |{''.join(row)}|")
        return "\n".join(lines)


def _times(value: float | Sequence[float], stages: int, what: str) -> list[float]:
    out = [float(value)] * stages if isinstance(value, int | float) else [float(v) for v in value]
    if len(out) != stages:
        raise ScheduleError(f"{what}: {stages} stages need {stages} times, got {len(out)}")
    if min(out) < 0:
        raise ScheduleError(f"{what}: times cannot be negative, got {min(out)}")
    return out


def schedule(
    name: str,
    ranks: int,
    microbatches: int,
    forward: float | Sequence[float] = 1.0,
    backward: float | Sequence[float] = 2.0,
    *,
    chunks: int = 1,
    transfer: float = 0.0,
    weight_share: float = 0.5,
) -> Schedule:
    """Simulate `name` ("gpipe", "1f1b", "interleaved", "zb-h1", "zbv") on `ranks` ranks.

    `forward` and `backward` are times per stage (ranks x chunks of them, or one number for all).
    `transfer` is added where data crosses ranks. In zero-bubble schedules backward splits into
    B (1 - `weight_share`) and W. ScheduleError for an unknown name or an order that cannot run.
    """
    if name not in NAMES:
        raise ScheduleError(f"unknown schedule {name!r}; known: {', '.join(NAMES)}")
    if ranks < 1 or microbatches < 1 or chunks < 1:
        raise ScheduleError("ranks, microbatches and chunks must be at least 1")
    chunks = 2 if name == "zbv" else chunks
    if chunks > 1 and name not in ("interleaved", "zbv"):
        raise ScheduleError(f"{name} has one chunk per rank; interleaved takes {chunks}")
    stages = ranks * chunks
    f, b = _times(forward, stages, "forward"), _times(backward, stages, "backward")
    split = name in ("zb-h1", "zbv")
    cost = {"F": f, "B": [x * (1 - weight_share) for x in b] if split else b}
    cost["W"] = [x * weight_share for x in b] if split else [0.0] * stages
    orders = order_of(name, ranks, microbatches, chunks, cost, transfer)
    owner = stage_map(name, ranks, chunks)
    spans = simulate(orders, owner, cost, transfer, microbatches)
    return Schedule(name, ranks, chunks, microbatches, spans, peak(spans, ranks, chunks, split))


def simulate(
    orders: Sequence[Sequence[Op]],
    owner: Sequence[int],
    cost: dict[str, list[float]],
    transfer: float,
    microbatches: int,
) -> tuple[Span, ...]:
    """Run every rank's list of operations; ScheduleError names the ranks of a deadlock."""
    _check_complete(orders, owner, microbatches)
    done: dict[Op, float] = {}
    at, clock = [0] * len(orders), [0.0] * len(orders)
    spans: list[Span] = []
    last = len(owner) - 1
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while at[rank] < len(order):
                op = order[at[rank]]
                ready = _ready(op, done, owner, transfer, last)
                if ready is None:
                    break
                start = max(clock[rank], ready)
                clock[rank] = done[op] = start + cost[op.kind][op.stage]
                spans.append(Span(rank, op.stage, op.microbatch, op.kind, start, clock[rank]))
                at[rank] += 1
                moved = True
    stuck = [r for r, order in enumerate(orders) if at[r] < len(order)]
    if stuck:
        what = ", ".join(f"rank {r} waits for {orders[r][at[r]]}" for r in stuck)
        raise ScheduleError(f"deadlock: {what}")
    return tuple(sorted(spans, key=lambda s: (s.rank, s.start, s.end)))


def _ready(
    op: Op, done: dict[Op, float], owner: Sequence[int], transfer: float, last: int
) -> float | None:
    """When `op` has what it needs, or None while that is not computed."""
    needs: list[tuple[Op, int]] = []
    if op.kind == "F" and op.stage > 0:
        needs.append((Op("F", op.stage - 1, op.microbatch), owner[op.stage - 1]))
    if op.kind == "B":
        needs.append((Op("F", op.stage, op.microbatch), owner[op.stage]))
        if op.stage < last:
            needs.append((Op("B", op.stage + 1, op.microbatch), owner[op.stage + 1]))
    if op.kind == "W":
        needs.append((Op("B", op.stage, op.microbatch), owner[op.stage]))
    ready = 0.0
    for need, rank in needs:
        if need not in done:
            return None
        ready = max(ready, done[need] + (transfer if rank != owner[op.stage] else 0.0))
    return ready


def _check_complete(
    orders: Sequence[Sequence[Op]], owner: Sequence[int], microbatches: int
) -> None:
    """Every (stage, microbatch) has F and B once, on the rank that owns the stage."""
    seen: set[Op] = set()
    for rank, order in enumerate(orders):
        for op in order:
            if op in seen:
                raise ScheduleError(f"{op} is listed twice")
            if owner[op.stage] != rank:
                raise ScheduleError(f"{op} is on rank {rank}, its stage is on {owner[op.stage]}")
            seen.add(op)
    for stage in range(len(owner)):
        for m in range(microbatches):
            for kind in "FB":
                if Op(kind, stage, m) not in seen:
                    raise ScheduleError(f"{Op(kind, stage, m)} is missing")


def peak(spans: Sequence[Span], ranks: int, chunks: int, split: bool) -> tuple[float, ...]:
    """Largest number of whole-rank microbatches of activations alive on each rank.

    A chunk is 1/chunks of a rank's layers. It is alive from F to the end of B, or of W if split.
    """
    out = []
    release = "W" if split else "B"
    for rank in range(ranks):
        events = [(s.start, 1) for s in spans if s.rank == rank and s.kind == "F"]
        events += [(s.end, -1) for s in spans if s.rank == rank and s.kind == release]
        alive = best = 0
        for _, change in sorted(events, key=lambda e: (e[0], e[1])):
            alive += change
            best = max(best, alive)
        out.append(best / chunks)
    return tuple(out)


def bubble_formula(name: str, ranks: int, microbatches: int, chunks: int = 1) -> float:
    """Closed-form bubble share for equal stages: (p-1)/(m+p-1), interleaved (p-1)/(vm+p-1).

    ZB-H1 with F = B = W waits (p-1) of 3 m + (p-1) ticks. Raises for schedules without one.
    """
    p, m = ranks, microbatches
    if name in ("gpipe", "1f1b"):
        return (p - 1) / (m + p - 1)
    if name == "interleaved":
        return (p - 1) / (chunks * m + p - 1)
    if name == "zb-h1":
        return (p - 1) / (3 * m + p - 1)
    raise ScheduleError(f"no closed form for {name!r}")


def describe(s: Schedule, unit_s: float = 1.0) -> str:
    """One sentence in seconds, for a schedule simulated in units of `unit_s`."""
    return f"{s.name}: {human(s.time * unit_s, 's')}, of which {100 * s.bubble:.1f} % waiting"
