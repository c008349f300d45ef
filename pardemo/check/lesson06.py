"""Checks of lesson 06: the bubble, how many microbatches, one forward and one backward in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pardemo.check.verdict import NotYet, demand, verdict

Order = Sequence[tuple[str, int]]


@verdict
def bubble(answer: Callable[[int, int], float]) -> str:
    """`answer(p, m)`: share of all ranks' time that p equal stages wait with m microbatches."""
    demand(answer(1, 7), 0, "One stage waits for nobody.")
    for stages, microbatches in ((2, 1), (2, 4), (4, 8), (8, 3)):
        expected = (stages - 1) / (microbatches + stages - 1)
        demand(
            answer(stages, microbatches),
            expected,
            f"{stages} stages, {microbatches} microbatches: a rank works in {microbatches} of "
            f"{microbatches + stages - 1} slots each way.",
        )
    return "it does not depend on how long a forward or a backward takes, if all stages are equal"


@verdict
def least_microbatches(answer: Callable[[int, float], int]) -> str:
    """`answer(p, share)`: the fewest microbatches for which the bubble is at most `share`."""
    for stages, share in ((2, 0.5), (4, 0.1), (8, 0.05), (16, 0.2), (1, 0.1)):
        expected = 1
        while (stages - 1) > share * (expected + stages - 1) + 1e-12:
            expected += 1
        demand(
            answer(stages, share),
            expected,
            f"{stages} stages, at most {share:.0%}: count up from 1 until the bubble fits.",
        )
    return f"8 stages need {answer(8, 0.05)} microbatches to wait at most 5 % of the time"


@verdict
def one_forward_one_backward(answer: Callable[[int, int, int], Order]) -> str:
    """`answer(p, m, stage)`: ("F", i) and ("B", i) in order, at most p - stage of them kept."""
    for stages, microbatches in ((2, 4), (4, 8), (4, 4), (3, 2)):
        orders = [list(answer(stages, microbatches, stage)) for stage in range(stages)]
        for stage, order in enumerate(orders):
            _complete(order, stages, microbatches, stage)
            _kept(order, stages, microbatches, stage)
        _runs(orders, stages, microbatches)
    return "the time is GPipe's; the activations kept are p - stage instead of m"


def _complete(order: Order, stages: int, microbatches: int, stage: int) -> None:
    where = f"stage {stage} of {stages}, {microbatches} microbatches"
    wanted = {(kind, i) for kind in "FB" for i in range(microbatches)}
    if set(order) != wanted or len(order) != len(wanted):
        raise NotYet(order, f"every F and B of {microbatches} microbatches once", where)
    for i in range(microbatches):
        if order.index(("F", i)) > order.index(("B", i)):
            raise NotYet(order, f"F{i} before B{i}", where)


def _kept(order: Order, stages: int, microbatches: int, stage: int) -> None:
    """No more activations at once than stages still to come, this one included."""
    kept = most = 0
    for kind, _ in order:
        kept += 1 if kind == "F" else -1
        most = max(most, kept)
    demand(
        most,
        min(stages - stage, microbatches),
        f"Stage {stage} of {stages} with {microbatches} microbatches keeps too many or too few: "
        "start with min(p - 1 - stage, m) forwards, then one forward, one backward.",
    )


def _runs(orders: list[list[tuple[str, int]]], stages: int, microbatches: int) -> None:
    """Nobody waits for ever when each stage works through its list."""
    at, done = [0] * stages, set()
    moved = True
    while moved:
        moved = False
        for stage, order in enumerate(orders):
            while at[stage] < len(order):
                kind, i = order[at[stage]]
                before = (kind, i, stage - 1 if kind == "F" else stage + 1)
                if before[2] in range(stages) and before not in done:
                    break
                done.add((kind, i, stage))
                at[stage] += 1
                moved = True
    if len(done) != 2 * stages * microbatches:
        raise NotYet("a deadlock", "orders that run to the end", "Two stages wait for each other.")
