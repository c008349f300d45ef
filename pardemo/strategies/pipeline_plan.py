"""How a pipeline is cut and scheduled: its knobs, and what each schedule cannot do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn as nn
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

from pardemo.strategies import base, routing

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved1f1b": ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
    "loopedbfs": ScheduleLoopedBFS,
}
ONE_STAGE = ("gpipe", "1f1b")  # one stage per rank; the others hold several
V_SHAPE = ("zbv", "dualpipev")  # rank r holds stages r and 2p-1-r


def batch_norm(model: nn.Module) -> str | None:
    """The name of a BatchNorm that takes its statistics from the batch, if there is one."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            return name
    return None


def experts(model: nn.Module) -> str | None:
    """The name of a mixture of experts that counts over the batch it sees, if there is one."""
    routed = routing.seams(model)
    return next((name for name, m in model.named_modules() if any(m is x for x in routed)), None)


@dataclass(frozen=True)
class Plan:
    """How to cut and how to run: the knobs of a pipeline.

    `microbatches` None takes, for each batch, the divisor nearest to twice the ranks that the
    schedule allows. `virtual` is stages per rank (None: 1, or 2 where the schedule interleaves).
    `cut` names the pieces at which stages 1, 2, ... start; without it stages are balanced by
    `balance`: "parameters", "measured" (seconds on the first microbatch), or a list of costs.
    `schedule` None is 1f1b, or gpipe with one microbatch for a model with BatchNorm, whose
    statistics are the batch's, or with experts, whose choices are counted over the batch;
    `batchnorm="per_microbatch"` accepts the statistics of the microbatch.
    """

    schedule: str = "1f1b"
    microbatches: int | None = None
    virtual: int | None = None
    cut: Sequence[str] | None = None
    balance: str | Sequence[float] = "parameters"

    @classmethod
    def for_model(
        cls, model: nn.Module, schedule: str | None, microbatches: int | None, virtual: int | None,
        cut: Sequence[str] | None, balance: str | Sequence[float], batchnorm: str,
    ) -> Plan:  # fmt: skip
        """The plan these knobs make for `model`; what sees parts of a batch is refused."""
        if batchnorm not in ("refuse", "per_microbatch"):
            raise base.StrategyError(
                f'batchnorm is "refuse" or "per_microbatch", not {batchnorm!r}'
            )
        if isinstance(balance, str) and balance not in ("parameters", "measured"):
            raise base.StrategyError(f'balance is "parameters" or "measured", not {balance!r}')
        if batchnorm == "refuse" and (norm := batch_norm(model)):
            schedule, microbatches = schedule or "gpipe", microbatches or 1
            if microbatches > 1:
                raise base.StrategyError(
                    f"{norm} is a BatchNorm: it would see 1/{microbatches} of the batch "
                    "at a time, so training would not equal one process. Use microbatches=1, "
                    'or accept the difference with batchnorm="per_microbatch".'
                )
        if mixture := experts(model):
            schedule, microbatches = schedule or "gpipe", microbatches or 1
            if microbatches > 1:
                raise base.StrategyError(
                    f"{mixture} is a mixture of experts: it would count the choices of "
                    f"1/{microbatches} of the batch at a time, so training would not equal one "
                    "process. Use microbatches=1."
                )
        plan = cls(schedule or "1f1b", microbatches, virtual, cut, balance)
        plan.stages_per_rank()
        return plan

    def stages_per_rank(self) -> int:
        """Stages per rank; wrong knobs raise StrategyError."""
        if self.schedule not in SCHEDULES:
            raise base.StrategyError(
                f"no schedule is called {self.schedule!r}; there are {', '.join(SCHEDULES)}"
            )
        virtual = self.virtual or (1 if self.schedule in ONE_STAGE else 2)
        if self.schedule in ONE_STAGE and virtual != 1:
            raise base.StrategyError(
                f"{self.schedule} runs 1 stage per rank, not {virtual}: use interleaved1f1b"
            )
        if self.schedule in V_SHAPE and virtual != 2:
            raise base.StrategyError(f"{self.schedule} needs 2 stages per rank, not {virtual}")
        return virtual

    def against(self, microbatches: int, ranks: int) -> str | None:
        """Why this schedule cannot run so many microbatches; None when it can."""
        least = {"1f1b": ranks, "dualpipev": 2 * ranks}.get(self.schedule, 1)
        if microbatches < least:
            return (
                f"{self.schedule} needs at least {least} microbatches on {ranks} ranks, got "
                f"{microbatches}: raise microbatches, or use gpipe"
            )
        rounds = max(1, microbatches // ranks)
        if (
            self.schedule in ("interleaved1f1b", "interleaved_zero_bubble")
            and microbatches % rounds
        ):
            return (
                f"{self.schedule} runs {microbatches} microbatches in {rounds} rounds of "
                f"{ranks} ranks, which does not divide: use a multiple of {ranks}"
            )
        return None

    def count(self, batch_size: int, ranks: int) -> int:
        """Microbatches for a batch of this size; StrategyError when they cannot be equal."""
        if self.microbatches is None:
            fits = [m for m in range(1, batch_size + 1) if batch_size % m == 0]
            fits = [m for m in fits if self.against(m, ranks) is None]
            if not fits:
                raise base.StrategyError(
                    f"a batch of {batch_size} has no equal parts that {self.schedule} "
                    f"can run on {ranks} ranks: use a multiple of {2 * ranks}"
                )
            return min(fits, key=lambda m: (abs(m - 2 * ranks), m))
        reason = self.against(self.microbatches, ranks)
        if batch_size % self.microbatches:
            reason = (
                f"a batch of {batch_size} cannot be cut into {self.microbatches} equal "
                f"microbatches ({batch_size} / {self.microbatches} leaves "
                f"{batch_size % self.microbatches}): drop the last batch or change microbatches"
            )
        if reason:
            raise base.StrategyError(reason)
        return self.microbatches

    def owner(self, stage: int, ranks: int) -> int:
        """Which rank of the pipeline runs a stage: there and back for V schedules, else in turn."""
        lap, place = divmod(stage, ranks)
        return ranks - 1 - place if self.schedule in V_SHAPE and lap % 2 else place
