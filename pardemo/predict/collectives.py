"""Time of one collective from measured points: interpolate inside, fit only to extrapolate.

One `Curve` per (collective, ranks, nodes). Inside the measured sizes a monotone cubic in log-log,
of the time over a fit (latency, pipeline fill, bandwidth), so that few points are enough; outside
them alpha + beta x size, fitted with relative weights to the nearest points, and the evidence says
"extrapolated"; below the smallest size it does not where that one's time is already all latency. A
curve is never carried to another world size silently: `CurveSet.time` does it by the ring's step
count and says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pardemo.predict.prediction import human
from pardemo.predict.wire import kind_of, wire_factor

ALL_LATENCY = 0.9  # share of the smallest size's time above which smaller ones take as long,
SMALL = 8192  # bytes: if it is this small; larger sizes may be sent by another protocol
Points = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class AlphaBeta:
    """time = alpha_s + size / (1 / beta): seconds per call and seconds per payload byte."""

    alpha_s: float
    beta_s_per_byte: float

    def __call__(self, size_bytes: Any) -> Any:
        return self.alpha_s + self.beta_s_per_byte * size_bytes

    def __repr__(self) -> str:
        rate = 1 / self.beta_s_per_byte / 1e9 if self.beta_s_per_byte > 0 else float("inf")
        return f"alpha {human(self.alpha_s, 's')}, {rate:.4g} GB/s"


def fit_alpha_beta(sizes: Points, times: Points) -> AlphaBeta:
    """Least squares of relative errors (weights 1/t), alpha and beta kept from going negative.

    Plain least squares lets the largest size decide alone: small ones come out 30 to 90 % wrong.
    """
    s, t = np.asarray(sizes, float), np.asarray(times, float)
    if len(s) < 2:
        raise ValueError(f"alpha and beta need at least 2 sizes, got {len(s)}")
    a = np.stack([1 / t, s / t], axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(a, np.ones_like(t), rcond=None)
    if alpha < 0:
        alpha, beta = 0.0, float(np.sum(s / t) / np.sum((s / t) ** 2))
    if beta < 0:
        alpha, beta = float(np.sum(1 / t) / np.sum(1 / t**2)), 0.0
    return AlphaBeta(float(alpha), float(beta))


def _shapes(sizes: np.ndarray) -> np.ndarray:
    return np.stack([np.ones_like(sizes), np.sqrt(sizes), sizes], axis=1)


def fit_pipelined(sizes: Points, times: Points) -> np.ndarray:
    """(a, g, b) of a + g sqrt(size) + b size, none negative, by relative errors.

    A transfer cut into chunks fills a pipeline: with the best chunk it takes
    (sqrt(a) + sqrt(b size))^2, whose middle term is what alpha and beta alone cannot follow.
    """
    from scipy.optimize import nnls  # not above: ranks import this module, and never fit

    s, t = np.asarray(sizes, float), np.asarray(times, float)
    a = _shapes(s) / t[:, None]
    scale = a.max(axis=0)
    found, _ = nnls(a / scale, np.ones_like(t))
    return np.asarray(found / scale)


class Curve:
    """Measured times of one collective at one world size; `curve(size)` -> (seconds, evidence)."""

    def __init__(
        self,
        collective: str,
        ranks: int,
        nodes: int,
        sizes_bytes: Points,
        times_s: Points,
    ) -> None:
        from scipy.interpolate import PchipInterpolator  # not above: ranks have no curves

        self.collective, self.ranks, self.nodes = kind_of(collective), ranks, nodes
        order = np.argsort(np.asarray(sizes_bytes, float))
        s = np.asarray(sizes_bytes, float)[order]
        t = np.asarray(times_s, float)[order]
        if len(s) == 0 or (s <= 0).any() or (t <= 0).any() or not np.isfinite(s * t).all():
            raise ValueError(f"{self}: sizes and times must be positive and not empty")
        self.sizes = np.unique(s)
        # the same size measured twice: the median of its times
        self.times = np.array([float(np.median(t[s == u])) for u in self.sizes])
        self._fit, self._inside = AlphaBeta(float(self.times[0]), 0.0), None
        self._base = np.array([float(self.times[0]), 0.0, 0.0])
        if len(self.sizes) >= 2:
            self._fit = fit_alpha_beta(self.sizes, self.times)
            self._base = np.array([self._fit.alpha_s, 0.0, self._fit.beta_s_per_byte])
        if len(self.sizes) >= 3:
            self._base = fit_pipelined(self.sizes, self.times)
        if len(self.sizes) >= 2:
            ratio = self.times / (_shapes(self.sizes) @ self._base)
            self._inside = PchipInterpolator(np.log(self.sizes), np.log(ratio))

    def __repr__(self) -> str:
        return f"{self.collective} over {self.ranks} ranks in {self.nodes} node(s)"

    @property
    def range_bytes(self) -> tuple[float, float]:
        """Smallest and largest measured size."""
        return float(self.sizes[0]), float(self.sizes[-1])

    def alpha_beta(self) -> AlphaBeta:
        """The fit over all points."""
        return self._fit

    def __call__(self, size_bytes: float) -> tuple[float, str]:
        """Seconds for a payload of `size_bytes`, and what the number rests on."""
        lo, hi = self.range_bytes
        if size_bytes <= 0:
            return 0.0, "nothing to send"
        if lo <= size_bytes <= hi:
            if self._inside is None:
                return float(self.times[0]), f"measured, {self}"
            ratio = float(np.exp(self._inside(np.log(size_bytes))))
            base = float((_shapes(np.array([size_bytes])) @ self._base)[0])
            return ratio * base, f"interpolated, {self}"
        seconds, latency = self._outside(size_bytes)
        if size_bytes < lo <= SMALL and latency >= ALL_LATENCY:
            share = f"{human(lo, 'bytes')}, whose time is {latency:.0%} latency"
            return (
                seconds,
                f"measured latency: {human(size_bytes, 'bytes')} is below {share}, {self}",
            )
        where = f"{human(size_bytes, 'bytes')} outside {human(lo, 'bytes')} to {human(hi, 'bytes')}"
        return seconds, f"extrapolated: {where}, {self}"

    def _outside(self, size: float) -> tuple[float, float]:
        """Scale the nearest measured time by alpha-beta fitted to the points on that side.

        Also the share of latency, alpha, in that nearest time; 0 where one size was measured.
        """
        if len(self.sizes) == 1:
            return float(self.times[0] * max(1.0, size / self.sizes[0])), 0.0
        small = size < self.sizes[0]
        side = slice(0, 4) if small else slice(-4, None)
        fit = fit_alpha_beta(self.sizes[side], self.times[side])
        near = 0 if small else -1
        nearest = fit(float(self.sizes[near]))
        return float(self.times[near] * fit(size) / nearest), float(fit.alpha_s / nearest)


class CurveSet:
    """All curves of a machine; `time(kind, ranks, nodes, size)` finds the right one."""

    def __init__(self, curves: Iterable[Curve] = ()) -> None:
        self.curves = {(c.collective, c.ranks, c.nodes): c for c in curves}

    def __len__(self) -> int:
        return len(self.curves)

    def __repr__(self) -> str:
        return f"{len(self)} curves: " + "; ".join(repr(c) for c in self.curves.values())

    def time(self, kind: str, ranks: int, nodes: int, size_bytes: float) -> tuple[float, str]:
        """Seconds and evidence; a world size that was not measured is 'extrapolated'.

        LookupError when this collective was never measured on so many (or any) nodes: one node
        says nothing about a network.
        """
        kind = kind_of(kind)
        if ranks <= 1 or size_bytes <= 0:
            return 0.0, "nothing to send"
        exact = self.curves.get((kind, ranks, nodes))
        if exact is not None:
            return exact(size_bytes)
        near = [c for (k, _, n), c in self.curves.items() if k == kind and (n > 1) == (nodes > 1)]
        if not near:
            raise LookupError(
                f"no curve of {kind} on {'several nodes' if nodes > 1 else 'one node'}; "
                f"measured: {self!r}. Calibrate it, or ask for a layout that does not need it."
            )
        c = min(near, key=lambda c: abs(np.log(c.ranks / ranks)) + abs(np.log(c.nodes / nodes)))
        seconds, _ = c(size_bytes)
        factor = wire_factor(kind, ranks) / wire_factor(kind, c.ranks)
        bandwidth = c.alpha_beta()
        latency = min(bandwidth.alpha_s, 0.9 * seconds)
        scaled = latency * (ranks - 1) / max(1, c.ranks - 1) + (seconds - latency) * factor
        return scaled, f"extrapolated: {ranks} ranks in {nodes} node(s) from {c}"
