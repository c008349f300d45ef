"""Score the physics on a table of training runs: calibrate on N rows, predict the rest.

Time: constants fitted on the N rows, then refined per machine where a table holds several. Memory:
constants fitted on the same rows' readings; a row is foreseen out of memory when the predicted peak
is above the device's. Rows on more than 4 times the calibrated nodes are refused and counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pardemo.predict.columns import Columns, cannot_start, take
from pardemo.predict.constants import MEMORY, TIME, Constant
from pardemo.predict.fit import Fit, fit, held_out_spread
from pardemo.predict.flop_check import flop_stats
from pardemo.predict.memory import fitted_total, total
from pardemo.predict.physics import seconds
from pardemo.predict.prediction import human
from pardemo.predict.runs import Runs, runs
from pardemo.predict.stats import auc, errors, regret
from pardemo.predict.step import FURTHEST
from pardemo.predict.tables import Table, TableError

DEFAULT_ROWS = 50
# a second valley of the fit: a network whose sends between stages fall into a slow mode
SLOW = {
    "p2p_stall_s": 0.3,
    "p2p_stall_nodes": 50.0,
    "unsharded_stall": 0.5,
    "pipelined_latency": 5.0,
    "net_latency_s": 1e-4,
}
# a layout predicted to fill more than this is not picked while others are left
ROOM = 0.92


@dataclass(frozen=True)
class ScoredRun:
    """One run that was predicted: its line in the file, its name, seconds said and published."""

    line: int
    name: str
    predicted_s: float
    measured_s: float

    @property
    def ratio(self) -> float:
        """Predicted / published: 1 is right, 2 is twice too slow."""
        return self.predicted_s / self.measured_s

    def __repr__(self) -> str:
        said, was = human(self.predicted_s, "s"), human(self.measured_s, "s")
        return f"{self.name}: predicted {said}, published {was}, ratio {self.ratio:.2f}"


@dataclass(frozen=True)
class RunScore:
    """Everything a score of runs says: `stats` (JSON-able), the fits, and the predicted runs."""

    stats: dict[str, Any]
    fits: dict[str, Fit]
    runs: tuple[ScoredRun, ...]


@dataclass(frozen=True)
class Small:
    """Which runs may calibrate: those on at most `nodes`, of models of at most `parameters`."""

    nodes: float = np.inf
    parameters: float = np.inf

    def among(self, data: Runs, rows: np.ndarray) -> np.ndarray:
        """Those of `rows`; TableError when there are none."""
        nodes, size = data.columns["nodes"][rows], parameters(data.columns)[rows]
        found = rows[(nodes <= self.nodes) & (size <= self.parameters)]
        if len(found) == 0:
            raise TableError(
                f"no run on at most {self.nodes:g} nodes of a model of at most {self.parameters:g} "
                f"parameters: the smallest have {nodes.min():g} nodes, {size.min():.3g} parameters"
            )
        return found


def parameters(c: Columns) -> np.ndarray:
    """Parameters of each run's model that a token uses."""
    return c["layers"] * c["active_p"] + c["table_p"]


def choose(
    candidates: np.ndarray, wanted: int | None, seed: int, path: str, total: int
) -> np.ndarray:
    """Which rows calibrate: `wanted` of the candidates at random, by default 50 or half of all.

    `total` usable rows there are; where fewer are candidates, all of these may be taken.
    """
    if wanted is None:
        wanted = min(DEFAULT_ROWS, total // 2)
    if wanted < 0:
        raise TableError(f"{path}: --calibrate-rows must be 0 or more, got {wanted}")
    if wanted >= total:
        raise TableError(
            f"{path}: --calibrate-rows {wanted} leaves nothing to predict: {total} usable rows"
        )
    order = np.random.default_rng(seed).permutation(candidates)
    return np.sort(order[:wanted])


def score_runs(
    table: Table, wanted: int | None, seed: int, small: Small = Small()
) -> RunScore:  # fmt: skip
    """Calibrate on `small` runs, predict, and compare; TableError when nothing is left."""
    data = runs(table)
    timed = np.flatnonzero(data.ran & np.isfinite(data.seconds))
    if len(timed) == 0:
        raise TableError(f"{table.path}: no row has a time")
    learn = choose(small.among(data, timed), wanted, seed, table.path, len(timed))
    fits: dict[str, Fit] = {}
    peak, fits_memory = predict_memory(data, learn)
    if fits_memory is not None:
        fits["memory"] = fits_memory
        if not data.ran.all():  # only such tables show where the limit is
            data.columns["fullness"] = np.minimum(peak / data.capacity, 2.0)
    predicted, time_fits = predict_time(data, learn)
    fits |= time_fits
    rest = np.setdiff1d(timed, learn)
    refused = beyond(data.columns, learn, rest)
    answered = rest[~refused]
    stats: dict[str, Any] = {
        "rows": len(data),
        "calibrated": len(learn),
        "predicted": len(answered),
        "refused": int(refused.sum()),
        "time": errors(predicted[answered], data.seconds[answered]),
        "skipped": data.skipped,
        "unknown_gpus": list(data.unknown),
    }
    stats |= extrapolated(data, learn, answered, predicted)
    far = data.columns["nodes"][answered] > 1
    if far.any() and not far.all():  # one median over both would hide the harder half
        for name, some in (("one_node", answered[~far]), ("several_nodes", answered[far])):
            stats[name] = errors(predicted[some], data.seconds[some])
    if len(answered):
        lo, hi = held_out_spread(
            seconds, time_fits["time"], take(data.columns, learn), data.seconds[learn]
        )
        ratio = data.seconds[answered] / predicted[answered]
        stats["time"]["inside_interval"] = float(((ratio >= lo) & (ratio <= hi)).mean())
        stats["regret"] = regrets(data, answered, predicted, peak)
    stats |= memory_stats(data, learn, peak)
    stats["flops"] = flop_stats(table)
    told = tuple(
        ScoredRun(int(data.rows[i]), str(data.name[i]), float(predicted[i]), float(data.seconds[i]))
        for i in answered
    )
    return RunScore(stats, fits, told)


def extrapolated(
    data: Runs, learn: np.ndarray, answered: np.ndarray, predicted: np.ndarray
) -> dict[str, Any]:
    """Errors apart for runs on more nodes, and of larger models, than any that calibrated."""
    out = {}
    if len(learn):
        sizes = {"more_nodes": data.columns["nodes"], "larger_models": parameters(data.columns)}
        for name, size in sizes.items():
            some = answered[size[answered] > size[learn].max()]
            if len(some):
                out[name] = errors(predicted[some], data.seconds[some])
    return out


def beyond(c: Columns, learn: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Rows on so many more nodes than any calibration row that no answer is given."""
    if len(learn) == 0:
        return np.zeros(len(rest), bool)
    return c["nodes"][rest] > FURTHEST * c["nodes"][learn].max()


def predict_time(data: Runs, learn: np.ndarray) -> tuple[np.ndarray, dict[str, Fit]]:
    """Seconds for every row, and the fits: one for all, one per machine where there are several."""
    c, y = data.columns, data.seconds
    starts = [{}, SLOW] if (c["nodes"] > 1).any() else [{}]
    whole = fit(seconds, TIME, take(c, learn), y[learn], starts=starts)
    out = seconds(c, whole.theta)
    fits = {"time": whole}
    groups = np.unique(data.group)
    if len(groups) < 2:
        return out, fits
    for name in groups:
        mine = learn[data.group[learn] == name]
        if len(mine) < 2:
            continue
        near = narrowed(TIME, whole)
        refined = fit(seconds, near, take(c, mine), y[mine])
        rows = np.flatnonzero(data.group == name)
        out[rows] = seconds(take(c, rows), refined.theta)
        fits[f"time: {name}"] = refined
    return out, fits


def narrowed(constants: tuple[Constant, ...], found: Fit) -> tuple[Constant, ...]:
    """The same constants with a fit's values as usual ones: the prior of one machine's refit."""
    values = found.values()
    return tuple(
        Constant(
            k.name,
            k.unit,
            k.low,
            float(np.clip(values[k.name], k.low, k.high)),
            k.high,
            k.spread / 2,
            k.meaning,
        )
        for k in constants
    )


def predict_memory(data: Runs, learn: np.ndarray) -> tuple[np.ndarray, Fit | None]:
    """Predicted peak bytes of every row: fitted where rows have readings, else the closed form."""
    mine = learn[np.isfinite(data.memory[learn])]
    if len(mine) < 5:
        return total(data.columns | {"balanced": data.columns["pp"] * 0}), None
    found = fit(fitted_total, MEMORY, take(data.columns, mine), data.memory[mine], scale=0.08)
    peak = fitted_total(data.columns, found.theta)
    return np.where(cannot_start(data.columns), np.inf, peak), found


def regrets(
    data: Runs, answered: np.ndarray, predicted: np.ndarray, peak: np.ndarray
) -> dict[str, Any]:
    """Regret among held-out rows of the same model, GPUs and tokens; full ones rank last."""
    full = peak[answered] > ROOM * data.capacity[answered]
    ranked = np.where(full, 1e6 * predicted[answered], predicted[answered])
    return regret(data.where[answered], ranked, data.seconds[answered])


def memory_stats(data: Runs, learn: np.ndarray, peak: np.ndarray) -> dict[str, Any]:
    """Errors of the predicted peaks, and how well running out of memory was foreseen."""
    out: dict[str, Any] = {}
    rest = np.setdiff1d(np.arange(len(data)), learn)
    read = rest[np.isfinite(data.memory[rest]) & np.isfinite(peak[rest])]
    if len(read):
        out["memory"] = errors(peak[read], data.memory[read])
    failed = ~data.ran[rest]
    if failed.any():
        over = peak[rest] > data.capacity[rest]
        out["out_of_memory"] = {
            "rows": int(failed.sum()),
            "foreseen": float(over[failed].mean()),
            "false_alarms": float(over[~failed].mean()) if (~failed).any() else 0.0,
            "auc": auc(peak[rest] / data.capacity[rest], failed),
            "failed_below_half": int((failed & (peak[rest] < data.capacity[rest] / 2)).sum()),
        }
    return out
