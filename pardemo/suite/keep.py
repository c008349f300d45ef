"""Record what the suite measured: one run, one case per row, every raw sample."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pardemo import records
from pardemo.measure import Comparison


def record(
    path: str | Path,
    benchmark: str,
    told: Mapping[str, Any],
    found: Comparison,
    rows: Iterable[tuple[str, Mapping[str, Any]]],
) -> str:
    """Write (name, values) rows with the samples of the same name; returns the run's id."""
    store = records.open(path)
    try:
        with store.begin(benchmark, told) as run:
            for name, values in rows:
                timed = name in found.timings
                samples = _samples(found, name) if timed else []
                steps = {"steps_per_sample": found[name].steps} if timed else {}
                run.add(name, {**values, **steps}, samples, status="done" if timed else "not timed")
        return run.id
    finally:
        store.close()


def _samples(found: Comparison, name: str) -> list[records.Sample]:
    """Every sample of one variant, warm-up flagged: the slowest rank's seconds per step."""
    return [
        records.Sample(block.round, block.order, iteration, float(seconds), block.phase)
        for phase in ("warmup", "measure")
        for block in found.samples.of(name, phase)
        for iteration, seconds in enumerate(block.step_s)
    ]
