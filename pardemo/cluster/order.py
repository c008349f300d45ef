"""The order of the data, as something that can be saved: resumed training sees the next samples.

The position counts samples of the whole run, not of one rank, so that it holds for any number of
ranks; the permutation of an epoch is a function of (seed, epoch) alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


class DataOrder:
    """Global batches of `batch_size` sample numbers below `length`, a new shuffle every epoch.

    A last batch that would be short is left out. `position` counts batches handed out so far.
    """

    def __init__(self, length: int, batch_size: int, seed: int = 0) -> None:
        if not 1 <= batch_size <= length:
            raise ValueError(f"batch_size must be 1 to {length} (the samples), not {batch_size}")
        self.length, self.batch_size, self.seed, self.position = length, batch_size, seed, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        epoch, batch = divmod(self.position, self.length // self.batch_size)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        start = batch * self.batch_size
        self.position += 1
        return torch.randperm(self.length, generator=generator)[start : start + self.batch_size]

    def state(self) -> dict[str, int]:
        """Plain numbers for a checkpoint's `extra`."""
        names = ("length", "batch_size", "seed", "position")
        return {name: getattr(self, name) for name in names}

    def load(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; refused for another data set, batch size or seed."""
        for name in ("length", "batch_size", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the checkpoint's order has {name} {state[name]}, this one "
                    f"{getattr(self, name)}: the samples would not be the next ones"
                )
        self.position = int(state["position"])
