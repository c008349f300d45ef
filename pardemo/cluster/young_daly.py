"""How often to save: the interval that wastes least time, by formula and by simulation.

A save costs `save_s`; a failure costs the work since the last save, and `restart_s` to be back.
Failures come at random (exponential), `mtbf_s` apart on average for the whole cluster: that of one
device divided by their number. Young 1974 and Daly 2006 give the best interval between saves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# Llama 3 (Dubey et al. 2024, table 5): 419 unexpected interruptions in 54 days on 16,384 GPUs.
LLAMA3_GPUS = 16_384
LLAMA3_MTBF_S = 54 * 86_400 / 419


def cluster_mtbf_s(device_mtbf_s: float, devices: int) -> float:
    """Mean time between failures of `devices` of which each fails once in `device_mtbf_s`."""
    _positive(device_mtbf_s=device_mtbf_s, devices=devices)
    return device_mtbf_s / devices


def young_s(save_s: float, mtbf_s: float) -> float:
    """Best seconds of work between saves, first order: sqrt(2 x save x MTBF) (Young 1974)."""
    _positive(save_s=save_s, mtbf_s=mtbf_s)
    return math.sqrt(2 * save_s * mtbf_s)


def daly_s(save_s: float, mtbf_s: float) -> float:
    """Best seconds of work between saves, higher order (Daly 2006).

    Good also where a save costs as much as half the time between failures; the MTBF beyond.
    """
    _positive(save_s=save_s, mtbf_s=mtbf_s)
    if save_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = save_s / (2 * mtbf_s)
    return math.sqrt(2 * save_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s


def waste(interval_s: float, save_s: float, mtbf_s: float, restart_s: float = 0.0) -> float:
    """Expected share of the time that is not new work, for exponential failures (Daly 2006).

    Clock per second of work: mtbf/interval x exp(restart/mtbf) x (exp((interval+save)/mtbf) - 1).
    """
    _positive(interval_s=interval_s, save_s=save_s, mtbf_s=mtbf_s)
    grown = math.exp(restart_s / mtbf_s) * math.expm1((interval_s + save_s) / mtbf_s)
    return 1 - interval_s / (mtbf_s * grown)


@dataclass(frozen=True)
class Simulated:
    """One simulated training: seconds of work done, of the clock, and how many failures it met."""

    work_s: float
    clock_s: float
    failures: int

    @property
    def waste(self) -> float:
        """Share of the clock that was not new work."""
        return 1 - self.work_s / self.clock_s

    def __repr__(self) -> str:
        return (
            f"{self.work_s / 86_400:.1f} days of work took {self.clock_s / 86_400:.1f} days with "
            f"{self.failures:,} failures: {self.waste:.1%} wasted"
        )


def simulate(
    interval_s: float, save_s: float, mtbf_s: float, restart_s: float, work_s: float, seed: int = 0
) -> Simulated:
    """Train for `work_s` of work, failing at random, also during saves and restarts."""
    _positive(interval_s=interval_s, save_s=save_s, mtbf_s=mtbf_s, work_s=work_s)
    random = np.random.default_rng(seed)
    done = clock = 0.0
    failures = 0
    next_failure = random.exponential(mtbf_s)
    while done < work_s:
        chunk = min(interval_s, work_s - done)
        if clock + chunk + save_s <= next_failure:
            clock += chunk + save_s
            done += chunk
            continue
        clock, failures = next_failure, failures + 1
        next_failure = clock + random.exponential(mtbf_s)
        while clock + restart_s > next_failure:  # it fails again before it is back
            clock, failures = next_failure, failures + 1
            next_failure = clock + random.exponential(mtbf_s)
        clock += restart_s
    return Simulated(done, clock, failures)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, not {value!r}")
