"""Run every strategy on one workload: prove, predict, measure, take apart, record."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pardemo import check, records, strategies
from pardemo.launch import RankFailed, Ranks
from pardemo.machine import Machine, machine
from pardemo.measure import Case, Comparison, compare, decompose
from pardemo.predict import Prediction, Profile
from pardemo.strategies import StrategyError
from pardemo.workloads import Workload
from pardemo.workloads import workload as find_workload

from . import foresee, forms, inside, keep, ledger, weights
from .foretold import Foresight, Said, drift, foresight, numbers
from .table import ALL, ONE, Row, Table

Say = Callable[[str], None]
WAIT_S = 60.0  # for another timing to end, before this one is refused


@dataclass(frozen=True)
class Plan:
    """What one call of run() works with."""

    work: Workload
    batch_size: int
    nprocs: int
    here: Machine
    rounds: int
    seconds: float
    check_steps: int
    until: float  # time.monotonic() after which no further step is taken apart
    say: Say

    @cached_property
    def scene(self) -> forms.Scene:
        """The same, for closed forms."""
        return forms.Scene(self.work, self.nprocs, self.batch_size, self.here.backend)


@dataclass
class _Candidate:
    """A strategy on its way through the suite."""

    name: str
    ranks: int
    threads: int
    maker: inside.Maker
    row: Row
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def case(self) -> Case:
        """What measure runs."""
        strategy = strategies.get(self.maker.strategy)
        shape = strategy.shape(self.ranks) if self.ranks > 1 else ()
        mesh = dict(zip(strategy.axes, shape, strict=True)) if shape else None
        return Case(self.maker, ranks=self.ranks, threads=self.threads, mesh=mesh, label=self.name)


def run(
    workload: str | Workload = "mlp",
    strategies: Sequence[str] | None = None,
    *,
    nprocs: int | None = None,
    batch_size: int | None = None,
    rounds: int = 8,
    seconds: float = 60.0,
    check_steps: int = 2,
    limit_s: float = 230.0,
    profile: Profile | str | None = None,
    anatomy: bool = True,
    record: str | Path | None = None,
    say: Say = print,
) -> Table:
    """Every strategy on one workload and the same global batch; returns the table.

    A strategy is timed only after it trained to the same parameters as one process. `seconds` is
    the budget of the headline measurement; taking the steps apart (`anatomy`) costs about as much
    again, and stops when `limit_s` seconds have passed in all. `profile` is a calibrated machine
    (default: calibrate now). `record` is a results file. Raises ValueError for an unknown workload
    or strategy, records.Busy when something is timing.
    """
    here = machine()
    work = find_workload(workload) if isinstance(workload, str) else workload
    size = batch_size or work.batch_size
    plan = Plan(
        work,
        size,
        nprocs or max(2, here.devices),
        here,
        rounds,
        seconds,
        check_steps,
        time.monotonic() + limit_s,
        say,
    )
    with (
        records.timing_lock(f"{work.name}, batch {size}", WAIT_S),
        Ranks(plan.nprocs, timeout=max(120.0, 3 * seconds), echo=False) as ranks,
    ):
        return _run(plan, strategies, ranks, profile, anatomy, record)


def _run(
    plan: Plan,
    names: Sequence[str] | None,
    ranks: Ranks,
    profile: Profile | str | None,
    anatomy: bool,
    record: str | Path | None,
) -> Table:
    """The six steps, in the order in which they may influence each other."""
    began = time.monotonic()
    every = _candidates(plan, names)
    fit = [c for c in every if not c.row.reason]
    fit = [c for c in fit if _proven(plan, c, ranks)]
    ahead, said = _predict(plan, fit, ranks, profile)
    timed = [*_baselines(plan), *fit]
    plan.say(f"measuring {len(timed)} variants, interleaved")
    cases = {c.name: c.case for c in timed} | (ahead.cases() if ahead else {})
    found = compare(
        cases, ranks=ranks, rounds=plan.rounds, budget_s=plan.seconds,
        progress=every_fourth(plan.say),
    )  # fmt: skip
    notes = []
    if ahead is not None:
        beside = ahead.beside(found)
        notes = [one for one in beside.values() if isinstance(one, str)]
        notes += drift(said, beside, found)
        for candidate in fit:
            candidate.facts |= numbers(beside.get(candidate.name))
    if anatomy:
        for candidate in fit:
            notes += _take_apart(plan, candidate, ranks)
    rows = [_row(c, found) for c in [*timed, *(c for c in every if c not in fit)]]
    plan.say(f"done in {time.monotonic() - began:.0f} s; {found.stopped}")
    table = Table(
        plan.work.name, plan.batch_size, tuple(rows), plan.here.card(), found.stopped,
        tuple(notes),
    )  # fmt: skip
    if record is None:
        return table
    told = {"workload": table.workload, "batch_size": table.batch_size, "nprocs": plan.nprocs,
            "rounds": plan.rounds, "seconds": plan.seconds}  # fmt: skip
    values = [(row.name, row.values()) for row in rows]
    return dataclasses.replace(table, run_id=keep.record(record, "strategies", told, found, values))


def every_fourth(say: Say) -> Callable[[int, int, str], None]:
    """Progress of a comparison, a line for every fourth round."""

    def progress(done: int, most: int, text: str) -> None:
        if done % 4 == 0:
            say(f"round {done} of at most {most}: {text}")

    return progress


def _candidates(plan: Plan, names: Sequence[str] | None) -> list[_Candidate]:
    """Every wanted strategy with its place on this machine, and why it does not fit, if so."""
    model = plan.work.make_model(0)
    made = []
    for name in names if names is not None else strategies.names():
        strategy = strategies.get(name)
        if name == "single":
            continue  # the two baselines are always there
        against = strategy.reasons_against(model, plan.nprocs, plan.batch_size)
        if len(strategy.axes) > 1 and 1 in strategy.shape(plan.nprocs):
            against = [f"on {plan.nprocs} ranks one of its axes has degree 1: see its other part"]
        ranks, knobs = strategy.place(plan.nprocs, {})
        alone = ranks == 1 and plan.nprocs > 1
        maker = inside.Maker(
            name, plan.work, plan.batch_size, tuple(knobs.items()), alone and not plan.here.gpus
        )
        threads = plan.nprocs if alone and not plan.here.gpus else 1
        row = Row(name, strategy.title, ranks, threads, reason="; ".join(against),
                  batch_size=plan.batch_size)  # fmt: skip
        made.append(_Candidate(name, ranks, threads, maker, row))
    return made


def _baselines(plan: Plan) -> list[_Candidate]:
    """One rank with one thread, and (on CPUs) one rank with all cores."""
    wanted = {ONE: 1} if plan.here.gpus else {ONE: 1, ALL: plan.here.cores}
    return [
        _Candidate(
            name, 1, threads, inside.Maker("single", plan.work, plan.batch_size),
            Row(name, "one process", 1, threads, batch_size=plan.batch_size),
        )
        for name, threads in wanted.items()
    ]  # fmt: skip


def _proven(plan: Plan, candidate: _Candidate, ranks: Ranks) -> bool:
    """Whether it trains to one process's parameters, and can be looked at; else it is not timed."""
    try:
        verdict = check.strategy(
            candidate.name, plan.work, plan.nprocs, plan.check_steps,
            batch_size=min(plan.batch_size, max(8, 2 * plan.nprocs)), ranks=ranks,
            **dict(candidate.maker.knobs),
        )  # fmt: skip
        reason = "" if verdict else f"not equal to one process: {verdict.text}"
        equal = verdict.text
        if verdict:
            _look(plan, candidate, ranks)
    except (StrategyError, RankFailed) as error:
        reason, equal = f"cannot train this: {_short(error)}", ""
    candidate.row = dataclasses.replace(candidate.row, reason=reason, equal=equal)
    plan.say(f"{candidate.name}: {reason or 'equal to one process'}")
    return not reason


def _look(plan: Plan, candidate: _Candidate, ranks: Ranks) -> None:
    """Bytes counted against the closed form, rank by rank; memory of the fullest rank."""
    seen = list(ranks(inside.look, candidate.maker, candidate.ranks))[: candidate.ranks]
    axes = plan.scene.degrees(candidate.name)
    ledgers = [
        ledger.compare(
            candidate.name, one.traffic,
            forms.closed_form(candidate.name, plan.scene, rank, one.routed), axes,
        )
        for rank, one in enumerate(seen)
    ]  # fmt: skip
    busiest = max(ledgers, key=lambda found: (bool(found.unequal), found.sent_bytes))
    fullest = max(range(len(seen)), key=lambda rank: seen[rank].memory.get("peak_bytes", 0.0))
    candidate.facts |= {
        "ledger": busiest,
        "equal_ranks": sum(not found.unequal for found in ledgers),
        "sent_bytes": busiest.sent_bytes,
        "formula_bytes": busiest.formula_bytes,
        "formula": "; ".join(dict.fromkeys(e.formula for e in busiest.entries if e.formula)),
        "traffic_notes": (*busiest.notes, *seen[0].notes),
        "memory": seen[fullest].memory,
        "peak_at": seen[fullest].peak_at,
        **weights.forecast(candidate.name, plan.scene, fullest, candidate.ranks),
    }


def _predict(
    plan: Plan, fit: list[_Candidate], ranks: Ranks, profile: Profile | str | None
) -> tuple[Foresight | None, Said]:
    """Say a prediction of every strategy before any of them is timed; how to predict again."""
    names = [c.name for c in fit if c.ranks > 1]
    if not any(name not in foresee.MESHES for name in names):
        return None, {}
    plan.say("calibrating collectives, and parts of the step alone")
    ahead = foresight(names, plan.scene, ranks, profile)
    parts, said = ahead.before(ranks, plan.seconds / 4)
    plan.say(repr(parts))
    for found in said.values():
        if isinstance(found, Prediction):
            plan.say(f"predicted: {found!r}")
    return ahead, said


def _take_apart(plan: Plan, candidate: _Candidate, ranks: Ranks) -> list[str]:
    """Compute, exposed and overlapped transfer, idle; returns what a reader must know of it."""
    if candidate.ranks == 1:
        return []
    if time.monotonic() > plan.until:
        return [f"{candidate.name} was not taken apart: the time limit had passed"]
    plan.say(f"taking {candidate.name} apart")
    try:
        found = decompose(
            candidate.case, ranks=ranks, rounds=plan.rounds, max_rounds=plan.rounds,
            budget_s=plan.seconds / 6,
        )  # fmt: skip
    except RankFailed as error:
        return [f"{candidate.name} could not be taken apart: {_short(error)}"]
    for name in ("compute_s", "exposed_s", "overlapped_s", "idle_s", "rest_s"):
        candidate.facts[name] = getattr(found, name)
    return [f"{candidate.name}: {found.missing}"] if found.missing else []


def _row(candidate: _Candidate, found: Comparison) -> Row:
    """The finished row: facts, time, and the two ratios, paired by round."""
    if candidate.name not in found.timings:
        return candidate.row
    ratios: dict[str, Any] = {}
    for key, baseline in (("vs_one", ONE), ("vs_all", ALL)):
        if candidate.name != baseline and baseline in found.timings:
            ratios[key] = found.ratio(candidate.name, baseline)
    step = found[candidate.name]
    return dataclasses.replace(candidate.row, step=step, **candidate.facts, **ratios)


def _short(error: Exception) -> str:
    """The line of an error that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
