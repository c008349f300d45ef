"""In which order each rank runs its forwards and backwards, for every schedule.

An order is a list of `Op` per rank. GPipe, 1F1B, interleaved and ZB-H1 are written down; the
zero-bubble V is built greedily: a rank prefers B, then F while memory allows; W fills the waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

NAMES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zbv")


class Op(NamedTuple):
    """`kind` F, B or W of `microbatch` at `stage`."""

    kind: str
    stage: int
    microbatch: int

    def __repr__(self) -> str:
        return f"{self.kind}{self.microbatch}@stage{self.stage}"


def stage_map(name: str, ranks: int, chunks: int) -> list[int]:
    """Which rank holds each stage: round robin, or down and back up for zbv."""
    if name == "zbv":
        return [*range(ranks), *reversed(range(ranks))]
    return [s % ranks for s in range(ranks * chunks)]


def order_of(
    name: str,
    ranks: int,
    microbatches: int,
    chunks: int,
    cost: dict[str, list[float]],
    transfer: float,
) -> list[list[Op]]:
    """The operations of every rank in order."""
    if name == "gpipe":
        return [gpipe(r, microbatches) for r in range(ranks)]
    if name == "1f1b":
        return [one_f_one_b(r, ranks, microbatches) for r in range(ranks)]
    if name == "interleaved":
        return [interleaved(r, ranks, microbatches, chunks) for r in range(ranks)]
    if name == "zb-h1":
        return [zb_h1(r, ranks, microbatches) for r in range(ranks)]
    return greedy(name, ranks, microbatches, cost, transfer)


def gpipe(rank: int, microbatches: int) -> list[Op]:
    """All forwards, then all backwards."""
    forward = [Op("F", rank, m) for m in range(microbatches)]
    return forward + [Op("B", rank, m) for m in range(microbatches)]


def one_f_one_b(rank: int, ranks: int, microbatches: int) -> list[Op]:
    """p - 1 - rank forwards to warm up, then one forward and one backward in turn."""
    warm = min(ranks - 1 - rank, microbatches)
    order = [Op("F", rank, m) for m in range(warm)]
    for i in range(microbatches - warm):
        order += [Op("F", rank, warm + i), Op("B", rank, i)]
    return order + [Op("B", rank, m) for m in range(microbatches - warm, microbatches)]


def zb_h1(rank: int, ranks: int, microbatches: int) -> list[Op]:
    """1F1B with each W put off by `rank` backwards, so that it fills the wait at the end.

    Every rank then keeps at most p microbatches alive (F done, W not), 1F1B's peak on rank 0.
    """
    order: list[Op] = []
    for op in one_f_one_b(rank, ranks, microbatches):
        order.append(op)
        if op.kind == "B" and op.microbatch >= rank:
            order.append(Op("W", rank, op.microbatch - rank))
    return order + [Op("W", rank, m) for m in range(max(0, microbatches - rank), microbatches)]


def interleaved(rank: int, ranks: int, microbatches: int, chunks: int) -> list[Op]:
    """1F1B over chunks: microbatches go in groups of p through chunk 0, then chunk 1, ...

    Works for any number of microbatches: the last group may be smaller.
    """
    groups = [range(g, min(g + ranks, microbatches)) for g in range(0, microbatches, ranks)]
    forwards = [Op("F", c * ranks + rank, m) for g in groups for c in range(chunks) for m in g]
    backwards = [
        Op("B", c * ranks + rank, m) for g in groups for c in reversed(range(chunks)) for m in g
    ]
    total = len(forwards)
    warm = (ranks - 1 - rank) * 2 + (chunks - 1) * ranks
    if microbatches % ranks:
        # an incomplete group does not interleave; run it as all forwards, then all backwards
        warm = total
    warm = min(warm, total)
    order = forwards[:warm]
    for i in range(total - warm):
        order += [forwards[warm + i], backwards[i]]
    return order + backwards[total - warm :]


def greedy(
    name: str, ranks: int, microbatches: int, cost: dict[str, list[float]], transfer: float
) -> list[list[Op]]:
    """Zero bubble by list scheduling: B first, then F under the memory limit, W in the gaps.

    ZB-V keeps 2 p half-size chunks alive on every rank, the same peak as 1F1B's first rank.
    """
    owner = stage_map(name, ranks, 2)
    last = len(owner) - 1
    stages = [[s for s, o in enumerate(owner) if o == r] for r in range(ranks)]
    state = _Greedy(owner, last, cost, transfer, microbatches)
    orders: list[list[Op]] = [[] for _ in range(ranks)]
    total = len(owner) * microbatches * 3
    while sum(map(len, orders)) < total:
        choices = [state.choose(r, stages[r], 2 * ranks) for r in range(ranks)]
        start, rank, op = min(c for c in choices if c is not None)
        state.run(rank, op, start)
        orders[rank].append(op)
    return orders


class _Greedy:
    """The clock of the list scheduler: what is done, when each rank is free, what is alive."""

    def __init__(
        self,
        owner: Sequence[int],
        last: int,
        cost: dict[str, list[float]],
        transfer: float,
        microbatches: int,
    ) -> None:
        self.owner, self.last, self.cost = owner, last, cost
        self.transfer, self.microbatches = transfer, microbatches
        self.done: dict[Op, float] = {}
        self.free = [0.0] * (max(owner) + 1)
        self.alive = [0] * (max(owner) + 1)
        self.next = {(k, s): 0 for k in "FBW" for s in range(len(owner))}

    def arrival(self, op: Op) -> float | None:
        """When what `op` needs is here, None while it is not computed."""
        needs = []
        if op.kind == "F" and op.stage > 0:
            needs.append(Op("F", op.stage - 1, op.microbatch))
        if op.kind == "B":
            needs.append(Op("F", op.stage, op.microbatch))
            if op.stage < self.last:
                needs.append(Op("B", op.stage + 1, op.microbatch))
        if op.kind == "W":
            needs.append(Op("B", op.stage, op.microbatch))
        when = 0.0
        for need in needs:
            if need not in self.done:
                return None
            hop = self.transfer if self.owner[need.stage] != self.owner[op.stage] else 0.0
            when = max(when, self.done[need] + hop)
        return when

    def choose(self, rank: int, stages: list[int], limit: int) -> tuple[float, int, Op] | None:
        """The operation `rank` would start next: the earliest; B before F before W on a tie."""
        found: list[tuple[float, int, int, Op]] = []
        for preference, kind in enumerate("BFW"):
            for stage in reversed(stages):
                op = Op(kind, stage, self.next[kind, stage])
                if op.microbatch >= self.microbatches:
                    continue
                if kind == "F" and not self._room(rank, stages, stage, limit):
                    continue
                when = self.arrival(op)
                if when is not None:
                    start = max(self.free[rank], when)
                    found.append((start, preference, -stage, op))
        if not found:
            return None
        start, _, _, op = min(found)
        return start, rank, op

    def _room(self, rank: int, stages: list[int], stage: int, limit: int) -> bool:
        """May this rank start another forward without breaking its memory limit?

        A first chunk must leave room for second-chunk forwards, or it would block them for ever.
        """
        alive = self.alive[rank]
        if alive >= limit:
            return False
        if stage != stages[0]:
            return True
        gap = self.next["F", stages[0]] - self.next["F", stages[1]]
        return gap < limit - 1 and (alive < limit - 1 or gap <= 0)

    def run(self, rank: int, op: Op, start: float) -> None:
        """Take the operation: advance the rank's clock and the counts."""
        end = start + self.cost[op.kind][op.stage]
        self.done[op] = self.free[rank] = end
        self.next[op.kind, op.stage] += 1
        self.alive[rank] += {"F": 1, "B": 0, "W": -1}[op.kind]
