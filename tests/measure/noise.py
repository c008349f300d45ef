"""Synthetic step times with a known median: the noises a shared machine makes."""

from __future__ import annotations

import numpy as np


def session(
    kind: str, rng: np.random.Generator, rounds: int = 12, iterations: int = 8, variants: int = 2
) -> np.ndarray:
    """Times (variants, rounds, iterations), median 1, of variants interleaved in shuffled order."""
    n = rounds * variants * iterations
    z = 0.03 * rng.normal(size=n)
    if kind.startswith("memory"):  # AR(1) through the whole session, as load has
        rho = float(kind.split()[1])
        z = 0.03 * _autoregressive(rho, n, rng)
    elif kind == "drift":
        z += np.linspace(-0.1, 0.1, n)
    elif kind == "waves":
        z += 0.1 * np.sin(np.linspace(0, 2 * np.pi * rng.uniform(1, 4), n) + rng.uniform(0, 7))
    elif kind == "weather":  # every round has its own level
        z += np.repeat(0.1 * rng.normal(size=rounds), variants * iterations)
    elif kind == "bursts":  # now and then one cell meets another job
        hit = rng.random(rounds * variants) < 0.08
        z += np.repeat(np.where(hit, np.log(rng.uniform(1.3, 2, hit.size)), 0), iterations)
    elif kind.startswith("rounds"):  # AR(1) from round to round, whatever happens within
        rho = float(kind.split()[1])
        z += np.repeat(0.05 * _autoregressive(rho, rounds, rng), variants * iterations)
    elif kind == "lognormal":
        z = 0.3 * rng.normal(size=n)
    elif kind == "heavy":  # Student's t with 2 degrees of freedom: no variance
        z = 0.03 * rng.standard_t(2, size=n)
    elif kind == "skewed":
        z = np.log1p(rng.exponential(0.05, n)) - np.log1p(0.05 * np.log(2))
    elif kind != "white":
        raise ValueError(f"no noise called {kind!r}")
    z = z.reshape(rounds, variants, iterations)
    out = np.empty((variants, rounds, iterations))
    for r in range(rounds):
        for place, variant in enumerate(rng.permutation(variants)):
            out[variant, r] = z[r, place]
    return np.exp(out)


def _autoregressive(rho: float, n: int, rng: np.random.Generator) -> np.ndarray:
    """AR(1) with unit variance."""
    z = np.empty(n)
    z[0] = rng.normal()
    steps = rng.normal(size=n) * np.sqrt(1 - rho * rho)
    for i in range(1, n):
        z[i] = rho * z[i - 1] + steps[i]
    return z
