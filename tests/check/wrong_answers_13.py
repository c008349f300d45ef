"""Answers to lesson 13's exercises that must be told "not yet"."""

from __future__ import annotations

from typing import Any

WRONG: dict[str, list[Any]] = {
    "reduced_bytes": [
        lambda parameters, microbatches, no_sync: 4 * parameters,
        lambda parameters, microbatches, no_sync: 4 * parameters * microbatches,
        lambda parameters, microbatches, no_sync: parameters * (1 if no_sync else microbatches),
    ],
    "samples_to_hide": [
        lambda transfer_s, each_s: transfer_s / each_s,
        lambda transfer_s, each_s: int(transfer_s // each_s),
    ],
    "mfu": [
        lambda n, tokens, s, devices, peak, recompute: 6 * n * tokens / s / peak,
        lambda n, tokens, s, devices, peak, recompute: (
            (8 if recompute else 6) * n * tokens / s / devices / peak
        ),
    ],
}
