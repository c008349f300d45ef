"""Wrong answers to the checks of lesson 12; each must be told "not yet"."""

from __future__ import annotations

WRONG = {
    "hours_between_failures": [
        lambda years, devices: years * 365.25 * 24,
        lambda years, devices: years * 365.25 / devices,
    ],
    "interval_s": [
        lambda save, mtbf: (save * mtbf) ** 0.5,
        lambda save, mtbf: mtbf / 2,
    ],
    "newest_good": [
        lambda checkpoints: max(step for step, *_ in checkpoints),
        lambda checkpoints: checkpoints[-1][0],
        lambda checkpoints: next(step for step, want, got in checkpoints if want == got),
    ],
}
