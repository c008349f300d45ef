"""Checks of lesson 01: whose memory it is, an exchange that ends, equal numbers of collectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pardemo.check.verdict import NotYet, demand, verdict


@verdict
def last_counts(answer: Callable[[int, int], list[int]]) -> str:
    """`answer(n, calls)`: what the last of `calls` calls of `count` returns, by rank."""
    for ranks, calls in ((1, 1), (2, 1), (2, 5), (4, 3)):
        demand(
            answer(ranks, calls),
            [1 + rank for rank in range(ranks)],
            f"n={ranks}, calls={calls}: the kernel's counter stays 0 and travels each time.",
        )
    return "each call begins with the kernel's value"


@verdict
def order(answer: Callable[[int, int], Sequence[str]]) -> str:
    """`answer(rank, n)`: send or receive first, so that a ring of blocking calls ends."""
    for size in range(2, 10):
        plan = [list(answer(rank, size)) for rank in range(size)]
        for rank, calls in enumerate(plan):
            if sorted(calls) != ["recv", "send"]:
                raise NotYet(calls, ["send", "recv"], f"Rank {rank} of {size}: one of each.")
        rounds, stuck = _exchange(plan)
        if stuck:
            raise NotYet(f"ranks {stuck} waiting", "nobody waiting", f"In a ring of {size} ranks.")
        if rounds > 3:
            hint = f"A ring of {size} ends, one rank after the other. Let many exchange at once."
            raise NotYet(f"{rounds} rounds", "at most 3", hint)
    return "rings of 2 to 9 ranks exchange in at most 3 rounds"


def _exchange(plan: list[list[str]]) -> tuple[int, list[int]]:
    """Play blocking calls on a ring: rounds until all are done, and who waits for ever."""
    size, rounds = len(plan), 0
    todo = [list(calls) for calls in plan]
    while any(todo):
        meet = [
            rank
            for rank in range(size)
            if todo[rank][:1] == ["send"] and todo[(rank + 1) % size][:1] == ["recv"]
        ]
        if not meet:
            return rounds, [rank for rank in range(size) if todo[rank]]
        for rank in meet:
            todo[rank].pop(0)
            todo[(rank + 1) % size].pop(0)
        rounds += 1
    return rounds, []


@verdict
def steps_per_rank(answer: Callable[[list[int], int], list[int]]) -> str:
    """`answer(samples, batch)`: steps of each rank, as many as all of them can run."""
    for samples, batch in (([10, 8], 2), ([7, 7, 7], 3), ([100, 64, 81, 99], 8)):
        demand(
            answer(list(samples), batch),
            [min(samples) // batch] * len(samples),
            f"samples {samples}, batch {batch}: every rank must call as many collectives.",
        )
    return "all ranks run as many steps as the one with the fewest samples can"
