"""Every sample that was taken, warm-up included: nothing is thrown away, everything is flagged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pardemo.measure.evidence import NO_TOLL, Toll

Phase = Literal["warmup", "measure"]


@dataclass(frozen=True)
class Block:
    """The samples of one variant in one round: arrays of shape (ranks, samples).

    A sample is `steps` steps in a row, its times are seconds per step; `switches` is of the whole
    sample, `start_s` its beginning on the host's monotonic clock, which ranks of one host share.
    `round` is -1 for the first warm-up; `order` is the variant's place in its round. `waited_s` is
    time in the run queue (ready, but no core), `worked_s` CPU time of the rank's main thread,
    `toll` what ran on the cores meanwhile (warm-up included).
    """

    variant: str
    round: int
    order: int
    phase: Phase
    start_s: NDArray[np.float64]
    wall_s: NDArray[np.float64]
    waited_s: NDArray[np.float64]
    worked_s: NDArray[np.float64]
    switches: NDArray[np.int64]
    toll: Toll = NO_TOLL
    steps: int = 1

    @property
    def step_s(self) -> NDArray[np.float64]:
        """The step's time: the maximum over ranks, per sample."""
        return self.wall_s.max(axis=0)

    @property
    def blocked_s(self) -> NDArray[np.float64]:
        """What each rank's main thread slept: neither working nor waiting for a core (CPU only)."""
        return np.maximum(self.wall_s - self.worked_s - self.waited_s, 0.0)


@dataclass(frozen=True)
class Samples:
    """The table of all samples of one session."""

    blocks: tuple[Block, ...] = field(repr=False)

    @property
    def variants(self) -> list[str]:
        """The names, in the order in which they first ran."""
        return list(dict.fromkeys(block.variant for block in self.blocks))

    def of(self, variant: str, phase: Phase = "measure") -> list[Block]:
        """The blocks of one variant, by round. KeyError names what there is."""
        if variant not in self.variants:
            raise KeyError(f"no variant {variant!r}; there are {', '.join(self.variants)}")
        found = [b for b in self.blocks if b.variant == variant and b.phase == phase]
        return sorted(found, key=lambda block: block.round)

    def rounds(self, variant: str) -> list[NDArray[np.float64]]:
        """Step times (maximum over ranks) of each measured round."""
        return [block.step_s for block in self.of(variant)]

    def waited(self, variant: str) -> float:
        """Share of the measured time that ranks spent ready but without a core."""
        blocks = self.of(variant)
        return float(sum(b.waited_s.sum() for b in blocks) / sum(b.wall_s.sum() for b in blocks))

    def toll(self, variant: str) -> Toll:
        """What ran on the cores while this variant was measured, all rounds together."""
        return sum((block.toll for block in self.of(variant)), NO_TOLL)

    def rows(self) -> Iterable[dict[str, Any]]:
        """One dict per rank and sample: the raw record. `iteration` counts samples of a round."""
        for b in self.blocks:
            for rank, iteration in np.ndindex(*b.wall_s.shape):
                yield {
                    "variant": b.variant,
                    "round": b.round,
                    "order": b.order,
                    "phase": b.phase,
                    "iteration": iteration,
                    "rank": rank,
                    "start_s": float(b.start_s[rank, iteration]),
                    "wall_s": float(b.wall_s[rank, iteration]),
                    "waited_s": float(b.waited_s[rank, iteration]),
                    "worked_s": float(b.worked_s[rank, iteration]),
                    "switches": int(b.switches[rank, iteration]),
                    "steps": b.steps,
                }

    def frame(self) -> Any:
        """The same as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame(list(self.rows()))

    def __repr__(self) -> str:
        measured = sum(b.wall_s.size for b in self.blocks if b.phase == "measure")
        warm = sum(b.wall_s.size for b in self.blocks) - measured
        return (
            f"{measured} samples of {len(self.variants)} variants, and {warm} of warm-up, "
            f"one per rank and sample"
        )
