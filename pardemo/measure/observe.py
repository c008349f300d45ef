"""observe(): run a training function as it is, with instruments on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pardemo.launch import Ranks, launch
from pardemo.machine import Machine, machine
from pardemo.measure.evidence import Spent, host, look, own_cpu_s, pooled
from pardemo.measure.instruments import COUNTED_STEP, RankRecord, Recorder
from pardemo.measure.roads import roads
from pardemo.measure.timing import milliseconds

WARM = 2  # steps at the start that are left out: buckets are rebuilt, caches are cold


@dataclass(frozen=True)
class Run:
    """A training run as every rank saw it; `diagnose(run)` says where its time went."""

    records: tuple[RankRecord, ...]
    cores: int
    load: tuple[str, ...] = ()
    name: str = ""
    machine: Machine | None = field(default=None, repr=False)

    def table(self, what: str) -> NDArray[np.float64]:
        """One value per rank and step (warm steps, not the counted one): wall_s, own_s, ..."""
        fewest = min(len(record.steps) for record in self.records)
        use = [i for i in range(fewest) if i >= WARM and i != COUNTED_STEP] or list(range(fewest))
        if not use:
            raise ValueError("no optimizer stepped in this run: there is nothing to diagnose")
        return np.array([[getattr(r.steps[i], what) for i in use] for r in self.records])

    def median(self, what: str) -> NDArray[np.float64]:
        """The median over steps, by rank."""
        return np.median(self.table(what), axis=1)

    @property
    def step_s(self) -> float:
        """Median over steps of the slowest rank's step."""
        return float(np.median(self.table("wall_s").max(axis=0)))

    @property
    def values(self) -> list[Any]:
        """What the training function returned, by rank."""
        return [record.value for record in self.records]

    def __repr__(self) -> str:
        lines = [
            f"{self.name}: {milliseconds(self.step_s)} per step, {len(self.records)} ranks x "
            f"{self.records[0].threads} thread{'s' * (self.records[0].threads > 1)} on "
            f"{self.cores} devices"
        ]
        for rank, record in enumerate(self.records):
            own, moved, data = (
                float(self.median(what)[rank]) for what in ("own_s", "communication_s", "data_s")
            )
            lines.append(
                f"  rank {record.rank}: own work {milliseconds(own)}, waiting in communication "
                f"{milliseconds(moved)}, waiting for data {milliseconds(data)}"
            )
        return "\n".join(lines)


def observe(
    train: Callable[..., Any],
    *args: Any,
    nprocs: int = 2,
    threads: int = 1,
    timeout: float = 120.0,
    echo: bool = True,
    ranks: Ranks | None = None,
    **kwargs: Any,
) -> Run:
    """Run `train(*args, **kwargs)` on `nprocs` ranks and watch it: steps, waits, bytes, wrappers.

    `train` is a plain training function: a loop that ends its steps with optimizer.step(). At
    least 6 steps are wanted; two are left out as warm-up and one is used to count bytes. `echo`
    prints what the ranks print. `ranks` is a warm group to use instead of `nprocs` new ranks, of
    several nodes perhaps.
    """
    here = machine()
    if ranks is not None:
        results = ranks(_watched, train, args, kwargs)
        nprocs, threads = ranks.setup.nprocs, results[0][0].threads
    else:
        how: dict[str, Any] = {"nprocs": nprocs, "threads": threads, "timeout": timeout}
        results = launch(_watched, train, args, kwargs, echo=echo, **how)
    wanted = min(nprocs * threads, here.cores)
    return Run(
        tuple(record for record, _ in results),
        here.devices,
        tuple(pooled([spent for _, spent in results]).reasons(wanted, here.cores)),
        getattr(train, "__name__", "run"),
        here,
    )


def _watched(
    train: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[RankRecord, Spent]:
    """Inside a rank: the record, and what this machine and this rank did meanwhile."""
    before, used = look(), own_cpu_s()
    recorder = Recorder()
    with recorder.attached():
        value = train(*args, **kwargs)
    spent = Spent(own_cpu_s() - used, before, look(), host())
    return recorder.record(value, roads()), spent
