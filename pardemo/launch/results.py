"""What a launch gives back."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload


@dataclass(frozen=True, repr=False)
class Results(Sequence[Any]):
    """One value per rank, and how they came: `results[0]` is what rank 0 returned.

    `ready_s`: from the call to a process group on every rank; `elapsed_s`: from the call to the
    last value; `output`: what each rank wrote, standard output and error together, as text.
    """

    values: tuple[Any, ...]
    nprocs: int
    threads: int
    backend: str
    ready_s: float
    elapsed_s: float
    output: tuple[str, ...] = ()

    @overload
    def __getitem__(self, rank: int) -> Any: ...
    @overload
    def __getitem__(self, rank: slice) -> tuple[Any, ...]: ...
    def __getitem__(self, rank: int | slice) -> Any:
        return self.values[rank]

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        ranks = f"{self.nprocs} rank{'s' if self.nprocs != 1 else ''}"
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''} each"
        return (
            f"{ranks}, {threads}, {self.backend}: ready after {self.ready_s * 1e3:.0f} ms, "
            f"done after {self.elapsed_s * 1e3:.0f} ms, values {reprlib.repr(list(self.values))}"
        )
