"""compare(): variants in interleaved, shuffled rounds on one warm group of ranks."""

from __future__ import annotations

import contextlib
import math
import random
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from pardemo.launch import Ranks
from pardemo.machine import Machine, machine
from pardemo.measure import inside
from pardemo.measure.evidence import NO_TOLL, Toll, pooled
from pardemo.measure.inside import Case, Raw, Taken, Taking
from pardemo.measure.samples import Block, Phase, Samples
from pardemo.measure.timing import Ratio, Timing, milliseconds

SAMPLE_S = 0.05  # what stands between two samples, about 0.1 ms, is 0.2 % of this
MOST_STEPS = 50

Progress = Callable[[int, int, str], None]  # (rounds done, rounds at most, what happened)


@dataclass(frozen=True)
class Comparison:
    """What compare() found: one Timing per variant, all samples, and why it stopped."""

    timings: Mapping[str, Timing]
    samples: Samples = field(repr=False)
    stopped: str
    load: tuple[str, ...]
    machine: Machine = field(repr=False)

    def __getitem__(self, name: str) -> Timing:
        if name not in self.timings:
            raise KeyError(f"no variant {name!r}; there are {', '.join(self.timings)}")
        return self.timings[name]

    def ratio(self, name: str, to: str) -> Ratio:
        """The time of one variant over another's, paired by round."""
        return self[name].ratio(self[to])

    def __repr__(self) -> str:
        lines = [repr(timing) for timing in self.timings.values()]
        return "\n".join([*lines, f"stopped: {self.stopped}"])


@dataclass(frozen=True)
class _Plan:
    """How long to go on: rounds at least and at most, precision wanted, seconds to spend."""

    rounds: int
    max_rounds: int
    within: float
    budget_s: float


def compare(
    cases: Mapping[str, Case],
    *,
    ranks: Ranks | None = None,
    rounds: int = 8,
    max_rounds: int = 40,
    budget_s: float = 60.0,
    within: float = 0.05,
    iterations: int | None = None,
    sample_s: float = SAMPLE_S,
    warmup: int = 5,
    seed: int = 0,
    pin: bool = True,
    progress: Progress | None = None,
) -> Comparison:
    """Time the steps of several cases so that they may be compared.

    Every case is built and warmed up once (`warmup` flagged steps). Then rounds follow; in each,
    every case runs once, in shuffled order, after two flagged steps. A sample is one step, or as
    many in a row as last `sample_s` seconds (0: always one), so that what stands between two
    samples costs a short step no more than a long one. Samples per round are chosen (0.2 s of
    work, 3 to 50) unless `iterations` says how many single steps to take. At least `rounds` rounds
    run; more, up to `max_rounds`, until every interval lies within `within` of its median or
    `budget_s` seconds are spent. Each rank is pinned to its own core(s) where there are enough.
    """
    if not cases:
        raise ValueError("nothing to compare: pass at least one case")
    if rounds < 1 or max_rounds < rounds:
        raise ValueError(f"rounds={rounds} to max_rounds={max_rounds} is not a range of rounds")
    if iterations is not None and iterations < 1:
        raise ValueError(f"iterations={iterations}: at least 1 is needed")
    size = max(case.ranks for case in cases.values())
    plan = _Plan(rounds, max_rounds, within, budget_s)
    with contextlib.ExitStack() as stack:
        if ranks is None:
            ranks = stack.enter_context(Ranks(size, timeout=max(60.0, 2 * budget_s)))
        if size > ranks.setup.nprocs:
            raise ValueError(f"a case wants {size} ranks, the group has {ranks.setup.nprocs}")
        session = uuid.uuid4().hex
        stack.callback(_finish, ranks, session)
        choose = partial(_choose, cases, plan, iterations, sample_s)
        return _run(dict(cases), ranks, plan, session, choose, warmup, seed, pin, progress)


def _finish(ranks: Ranks, session: str) -> None:
    """Let the ranks forget the session, where they still live."""
    group = ranks._session
    if group is not None and group.alive:
        ranks(inside.finish, session)


def _run(
    cases: dict[str, Case],
    ranks: Ranks,
    plan: _Plan,
    session: str,
    choose: Callable[[Sequence[Block]], dict[str, Taking]],
    warmup: int,
    seed: int,
    pin: bool,
    progress: Progress | None,
) -> Comparison:
    """Warm up, go round until the plan is met, summarise."""
    here, clock = machine(), time.perf_counter()
    warm = list(ranks(inside.prepare, session, cases, warmup, pin))
    blocks = [_block(name, -1, 0, "warmup", _of(warm, name)) for name in cases if warmup]
    plans = choose(blocks)
    shuffler = random.Random(seed)
    done, stopped = 0, ""
    timings: dict[str, Timing] = {}
    while not stopped:
        order = shuffler.sample(list(cases), len(cases))
        taken = list(ranks(inside.run_round, session, order, plans, min(2, warmup)))
        for place, name in enumerate(order):
            found: list[Taken] = _of(taken, name)
            if warmup:
                blocks.append(_block(name, done, place, "warmup", [t.warmup for t in found]))
            toll = pooled([t.spent for t in found])
            timed, steps = [t.timed for t in found], plans[name].steps
            blocks.append(_block(name, done, place, "measure", timed, toll, steps))
        done += 1
        samples = Samples(tuple(blocks))
        timings = _summaries(cases, samples, here, session)
        stopped = _stop(plan, done, timings, time.perf_counter() - clock)
        if progress is not None:
            progress(done, plan.max_rounds, stopped or _worst(timings))
    return Comparison(timings, samples, stopped, _load(cases, samples, here), here)


def _of(per_rank: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    """What the ranks that take part in this variant brought."""
    return [taken[name] for taken in per_rank if name in taken]


def _block(
    name: str, number: int, place: int, phase: Phase, raws: Sequence[Raw],
    toll: Toll = NO_TOLL, steps: int = 1,
) -> Block:  # fmt: skip
    columns = ("start_s", "wall_s", "waited_s", "worked_s", "switches")
    start, wall, waited, worked, switches = (
        np.array([getattr(raw, column) for raw in raws]) for column in columns
    )
    return Block(name, number, place, phase, start, wall, waited, worked, switches, toll, steps)


def taking(step_s: float, share_s: float = math.inf, sample_s: float = SAMPLE_S) -> Taking:
    """Samples of a round and steps of a sample, for steps that take `step_s` seconds.

    0.2 s of work in 3 to 50 samples, fewer where `share_s`, a round's seconds, would not hold them.
    """
    step_s = max(step_s, 1e-6)
    steps = max(1, min(MOST_STEPS, math.ceil(sample_s / step_s), int(min(share_s, 1.0) / step_s)))
    each = steps * step_s
    wanted = min(50, max(3, math.ceil(0.2 / each)))
    return Taking(max(1, int(min(wanted, share_s / each))), steps)


def _choose(
    cases: Mapping[str, Case], plan: _Plan, wanted: int | None, sample_s: float,
    warm: Sequence[Block],
) -> dict[str, Taking]:  # fmt: skip
    """What to take of every case in a round, from the steps of the warm-up."""
    if wanted is not None:
        return dict.fromkeys(cases, Taking(wanted))
    expected = {block.variant: float(np.median(block.step_s)) for block in warm}
    share = plan.budget_s / plan.rounds / len(cases)
    return {name: taking(expected.get(name, 0.02), share, sample_s) for name in cases}


def _summaries(
    cases: Mapping[str, Case], samples: Samples, here: Machine, session: str
) -> dict[str, Timing]:
    timings = {}
    for name, case in cases.items():
        cores = here.devices * (case.threads if here.gpus else 1)
        toll, wanted = samples.toll(name), _wanted(case, here)
        timings[name] = Timing.of(
            samples.rounds(name),
            ranks=case.ranks,
            threads=case.threads,
            cores=cores,
            load=toll.reasons(wanted, here.cores),
            taken=toll.taken(wanted, here.cores),
            label=case.label or name,
            session=session,
            steps=samples.of(name)[0].steps,
        )
    return timings


def _wanted(case: Case, here: Machine) -> float:
    """Cores a case needs at once (on GPUs the one that launches kernels)."""
    return 1.0 if here.gpus else float(min(case.ranks * case.threads, here.cores))


def _load(cases: Mapping[str, Case], samples: Samples, here: Machine) -> tuple[str, ...]:
    """Signs of other work during the session, by the case that wanted most."""
    whole = sum((samples.toll(name) for name in cases), NO_TOLL)
    most = max(_wanted(case, here) for case in cases.values())
    return tuple(whole.reasons(most, here.cores))


def _stop(plan: _Plan, done: int, timings: Mapping[str, Timing], spent_s: float) -> str:
    """Why to stop now, or the empty string. The floor of rounds comes before the budget."""
    if done < plan.rounds:
        return ""
    if all(timing.precision <= plan.within for timing in timings.values()):
        return f"every interval lies within {plan.within:.0%} of its median after {done} rounds"
    if spent_s >= plan.budget_s:
        return f"the {plan.budget_s:g} s budget was spent after {done} rounds; {_worst(timings)}"
    if done >= plan.max_rounds:
        return f"{done} rounds, the most allowed; {_worst(timings)}"
    return ""


def _worst(timings: Mapping[str, Timing]) -> str:
    name, timing = max(timings.items(), key=lambda item: item[1].precision)
    sure = f"within {timing.precision:.0%}" if timing.precision < 2 else "no useful interval yet"
    return f"least certain: {name} {milliseconds(timing.median_s)}, {sure}"
