"""Fit the named constants to a few measured rows, inside their bounds, with priors.

The most probable constants given the rows: relative errors with a soft-L1 loss (a run hit by a
straggler does not decide), each constant held near its usual value by its prior. Twenty constants
from twenty rows is possible because the priors decide what the rows leave open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pardemo.predict.columns import Columns, take
from pardemo.predict.constants import Constant, named, vector

Model = Callable[[Columns, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Fit:
    """Constants (logs in `theta`), the rows they rest on and the spread of the residuals."""

    constants: tuple[Constant, ...]
    theta: np.ndarray
    rows: int
    median_error: float
    spread: tuple[float, float]

    def values(self) -> dict[str, float]:
        """Names to values."""
        return named(self.constants, self.theta)

    def at_bounds(self) -> list[str]:
        """Constants that ended on a bound: the physics there is doubtful, and said so."""
        out = []
        for c, v in self.values().items():
            k = next(x for x in self.constants if x.name == c)
            if v <= k.low * 1.001 or v >= k.high * 0.999:
                out.append(c)
        return out

    def __repr__(self) -> str:
        found = ", ".join(f"{k} {v:.3g}" for k, v in self.values().items())
        return f"fitted on {self.rows} rows, median error {100 * self.median_error:.1f} %: {found}"


def fit(
    model: Model,
    constants: Sequence[Constant],
    rows: Columns,
    measured: np.ndarray,
    scale: float = 0.06,
    starts: Sequence[Mapping[str, float]] = ({},),
    prior_weight: float = 0.5,
) -> Fit:
    """The constants under which `model(rows, theta)` comes closest to `measured` (positive).

    `scale` is the relative error at which the loss turns from square to absolute. The fit is
    repeated from every start (constants that differ from their usual values) and the best is
    kept: a network with a slow mode has two valleys. No rows gives the priors back.
    Deterministic.
    """
    from scipy.optimize import least_squares  # not above: only fitting needs it

    measured = np.asarray(measured, float)
    usual = vector(constants)
    if len(measured) == 0:
        return Fit(tuple(constants), usual, 0, float("nan"), (0.5, 2.0))
    low = np.log([c.low for c in constants])
    high = np.log([c.high for c in constants])
    spread = np.array([c.spread for c in constants])

    def residual(theta: np.ndarray) -> np.ndarray:
        error = np.log(np.maximum(model(rows, theta), 1e-30) / measured) / scale
        return np.concatenate([error, prior_weight * (theta - usual) / spread])

    best = None
    for start in starts:
        inside = np.clip(vector(constants, start), low + 1e-6, high - 1e-6)
        run = least_squares(residual, inside, bounds=(low, high), loss="soft_l1", max_nfev=60)
        if best is None or run.cost < best.cost:
            best = run
    assert best is not None
    ratio = measured / model(rows, best.x)
    spread_of = (float(np.quantile(ratio, 0.05)), float(np.quantile(ratio, 0.95)))
    error = float(np.median(np.abs(1 / ratio - 1)))
    return Fit(tuple(constants), best.x, len(measured), error, spread_of)


def held_out_spread(
    model: Model, found: Fit, rows: Columns, measured: np.ndarray, folds: int = 5
) -> tuple[float, float]:
    """5 % and 95 % of measured / predicted on calibration rows left out of the fit in turn.

    The residuals of the fitted rows themselves are too small: the constants bent towards them.
    """
    n = len(measured)
    if n < 2 * folds:
        return min(found.spread[0], 0.7), max(found.spread[1], 1.4)
    ratio = np.ones(n)
    for fold in range(folds):
        left = np.arange(n) % folds == fold
        again = fit(
            model,
            found.constants,
            take(rows, ~left),
            measured[~left],
            starts=[found.values()],
        )
        ratio[left] = measured[left] / model(take(rows, left), again.theta)
    return float(np.quantile(ratio, 0.05)), float(np.quantile(ratio, 0.95))


def bootstrap(
    model: Model,
    found: Fit,
    rows: Columns,
    measured: np.ndarray,
    target: Columns,
    draws: int = 12,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """(lo, hi) of `model(target)` over refits on resampled rows, widened by the residuals' 5-95 %.

    Resampling shows what the rows leave open; the residuals show what the physics leaves out.
    """
    rng = np.random.default_rng(seed)
    n = len(measured)
    each = []
    for _ in range(draws):
        i = rng.integers(0, n, n)
        again = fit(model, found.constants, take(rows, i), measured[i], starts=[found.values()])
        each.append(model(target, again.theta))
    lo, hi = np.quantile(each, [0.05, 0.95], axis=0)
    return lo * min(found.spread[0], 1.0), hi * max(found.spread[1], 1.0)
