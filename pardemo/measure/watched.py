"""What a watched training run leaves behind: plain numbers, per rank and per step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pardemo.measure.probes import AdamW, Wire
from pardemo.measure.roads import Road
from pardemo.measure.traffic import Traffic


@dataclass(frozen=True)
class StepRecord:
    """One step of one rank, in seconds; `own_s` is what it did without waiting for anybody.

    `queued_s` is time it was ready without a core, `pushed_s` the part of it outside of waiting.
    Parts of `communication_s`: `drained_s` in DDP's backward, `small_s` in the `small_calls` short
    collectives that the script itself calls between forward, backward and optimizer. Parts of
    `own_s`: `optimizer_s`, `saved_s` in torch.save, `outside_s` before a forward and between
    backward and optimizer. `backward_s` is the backward without its waiting, `searched_s` is
    what DDP does after a forward to prepare the backward.
    """

    wall_s: float
    communication_s: float
    data_s: float
    cpu_s: float
    queued_s: float
    backwards: int
    pushed_s: float = 0.0
    drained_s: float = 0.0
    small_s: float = 0.0
    small_calls: int = 0
    optimizer_s: float = 0.0
    saved_s: float = 0.0
    outside_s: float = 0.0
    backward_s: float = 0.0
    searched_s: float = 0.0
    samples: int = 0

    @property
    def own_s(self) -> float:
        """Work of this rank: the step without waiting for communication or data."""
        return max(0.0, self.wall_s - self.communication_s - self.data_s)

    @property
    def worked_s(self) -> float:
        """The same without the time in which it had no core: what it would take alone."""
        return max(0.0, self.own_s - self.pushed_s)


@dataclass(frozen=True)
class Wrapper:
    """Facts of one DDP module."""

    find_unused_parameters: bool
    unused: int
    parameters_bytes: int
    buckets_bytes: tuple[int, ...]
    cap_bytes: int = 0  # bucket_cap_mb


@dataclass(frozen=True)
class RankRecord:
    """What one rank's instruments saw."""

    rank: int
    threads: int
    samples: int
    steps: tuple[StepRecord, ...]
    traffic: Traffic | None
    wrappers: tuple[Wrapper, ...]
    value: Any = field(default=None, repr=False)
    roads: tuple[Road, ...] = ()
    wire: Wire | None = None
    adamw: AdamW | None = None
