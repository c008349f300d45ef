"""`score(path)`: predict a table of published runs and say how far off the predictions were."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pardemo.predict.fit import Fit
from pardemo.predict.score_collectives import score_collectives
from pardemo.predict.score_other import score_ddp
from pardemo.predict.score_runs import ScoredRun, Small, score_runs
from pardemo.predict.stats import finite, percent
from pardemo.predict.tables import TableError, read


@dataclass(frozen=True)
class Score:
    """How well one table was predicted; repr is the report, `.json()` one line of it.

    `runs` are the predicted rows of a table of runs, in the file's order.
    """

    path: str
    kind: str
    seed: int
    stats: dict[str, Any]
    fits: dict[str, Fit] = field(default_factory=dict)
    runs: tuple[ScoredRun, ...] = ()

    def misses(self, count: int = 3) -> list[ScoredRun]:
        """The runs whose prediction was furthest off, by |log(predicted / published)|."""
        return sorted(self.runs, key=lambda run: -abs(math.log(run.ratio)))[:count]

    def document(self) -> dict[str, Any]:
        """The JSON document: file, kind, seed, statistics, constants with units and bounds."""
        constants = {
            name: {
                k.name: {"value": f.values()[k.name], "unit": k.unit, "low": k.low, "high": k.high}
                for k in f.constants
            }
            for name, f in self.fits.items()
        }
        top = {"file": Path(self.path).name, "kind": self.kind, "seed": self.seed}
        for key in ("median_error", "p90_error", "worst_error", "rank_correlation"):
            top[key] = self.stats.get("time", {}).get(key)
        extra = {"constants": constants} if constants else {}
        return finite(top | self.stats | extra)

    def json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.document(), allow_nan=False)

    def __repr__(self) -> str:
        lines = [f"{Path(self.path).name}: {self.stats['rows']} rows, a table of {self.kind}"]
        lines += [_counted(self.stats)]
        for key, title in _TITLES.items():
            if self.stats.get(key, {}).get("rows"):
                lines.append(_errors(title, self.stats[key]))
        lines += [f"  far off, line {run.line}: {run!r}" for run in self.misses()]
        lines += _regret(self.stats.get("regret", {}))
        lines += _out_of_memory(self.stats.get("out_of_memory", {}))
        for name, s in self.stats.get("flops", {}).items():
            if s.get("rows"):
                lines.append(
                    f"  FLOP formula, {name} ({s['convention']} convention): median error "
                    f"{100 * s['median_error']:.2f} %, worst {100 * s['worst_error']:.2f} %, "
                    f"{s['rows']} rows"
                )
        for name, found in self.fits.items():
            bounds = found.at_bounds()
            note = f" (at their bounds: {', '.join(bounds)})" if bounds else ""
            lines.append(f"  constants, {name}{note}")
            lines += [
                f"    {k.name:<22} {found.values()[k.name]:>11.4g} {k.unit:<18} "
                f"[{k.low:g}, {k.high:g}]  {k.meaning}"
                for k in found.constants
            ]
        return "\n".join(lines)


_TITLES = {
    "time": "time",
    "one_node": "time on one node",
    "several_nodes": "time on several nodes",
    "more_nodes": "extrapolated: time on more nodes than calibrated",
    "larger_models": "extrapolated: time of larger models than calibrated",
    "inside": "sizes inside the measured range (interpolated)",
    "between_nodes": "between measured node counts, one size (no curve there)",
    "unseen": "curves without a calibrated point (data sheets, extrapolated)",
    "memory": "memory",
}


def _counted(stats: dict[str, Any]) -> str:
    text = f"  calibrated on {stats.get('calibrated', 0)} rows, predicted {stats['predicted']}"
    if "how" in stats:
        text = f"  {stats['curves']} curves, {stats['how']}: {stats['predicted']} predicted"
    if stats.get("refused"):
        text += f", refused {stats['refused']} (too many more nodes than calibrated)"
    for why, count in stats.get("skipped", {}).items():
        text += f"\n  skipped {count} rows: {why}"
    for name in stats.get("unknown_gpus", []):
        text += f"\n  unknown GPU {name!r}: the data sheet of an A100 was taken"
    return text


def _errors(title: str, s: dict[str, Any]) -> str:
    text = (
        f"  {title}: median error {percent(s['median_error'])}, p90 {percent(s['p90_error'])}, "
        f"worst {percent(s['worst_error'])}, rank correlation {s['rank_correlation']:.3f}, "
        f"{s['rows']} rows"
    )
    if "inside_interval" in s:
        text += f"; {percent(s['inside_interval'])} inside the 90 % interval"
    return text


def _regret(s: dict[str, Any]) -> list[str]:
    if not s.get("groups"):
        return []
    return [
        f"  layouts: regret of the pick {s['pick_median']:.3f} (worst {s['pick_worst']:.2f}), best "
        f"of the top 3 {s['top3_median']:.3f} (worst {s['top3_worst']:.2f}), a typical layout "
        f"{s['typical_layout_median']:.2f}; medians over {s['groups']} groups"
    ]


def _out_of_memory(s: dict[str, Any]) -> list[str]:
    if not s:
        return []
    crashed = s.get("failed_below_half", 0)
    return [
        f"  out of memory: {percent(s['foreseen'])} of {s['rows']} foreseen, false alarms "
        f"{percent(s['false_alarms'])}, AUC {s['auc']:.3f}; {crashed} of them failed at under half "
        "of the device's memory by prediction"
    ]


def score(
    path: str | Path, calibrate_rows: int | None = None, seed: int = 0,
    most_nodes: float = math.inf, most_parameters: float = math.inf,
) -> Score:  # fmt: skip
    """Predict the table at `path` after calibrating on some of its rows.

    calibrate_rows None means 50, or half of a small table (every other inner point for
    collectives). `most_nodes` and `most_parameters` let only small runs calibrate: what the others
    then cost is extrapolated, and refused on more than 4 times the nodes. TableError (a ValueError)
    with one line for a file that cannot be used.
    """
    if not 0 <= seed < 2**63:
        raise TableError(f"--seed must be at least 0 and below 2^63, got {seed}")
    table = read(path)
    if table.kind == "collectives":
        return Score(str(path), table.kind, seed, score_collectives(table, calibrate_rows, seed))
    if table.kind == "ddp":
        return Score(str(path), table.kind, seed, score_ddp(table, calibrate_rows, seed))
    found = score_runs(table, calibrate_rows, seed, Small(most_nodes, most_parameters))
    return Score(str(path), table.kind, seed, found.stats, found.fits, found.runs)
