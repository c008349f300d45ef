"""Score the predictor on tables of DataParallel and DDP against one GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from pardemo.predict.stats import errors
from pardemo.predict.tables import Table, TableError

DDP_NAMES = ("wrapper_share", "inside_share", "across_share", "gather_share", "slow_link_share")
DDP_MEANING = {
    "wrapper_share": "DDP's own work, as a share of one GPU's step",
    "inside_share": "exposed all-reduce inside a node, at (n-1)/n, as a share of one GPU's step",
    "across_share": "the same between nodes",
    "gather_share": "DataParallel's replicate, scatter and gather, at (n-1)/n",
    "slow_link_share": "exposed all-reduce without NVLink",
}
_LOW, _HIGH = np.array([0.0, 0, 0, 0, 0]), np.array([0.3, 1.5, 2, 3, 4])


def score_ddp(table: Table, wanted: int | None, seed: int) -> dict[str, Any]:
    """One GPU's step is given per model; shares of it are fitted on N rows, the rest predicted."""
    from scipy.optimize import least_squares  # not above: only fitting needs it

    step, gpus, base, kind, names = _ddp_rows(table)
    rest = np.flatnonzero((step > 0) & np.isfinite(step) & (base > 0) & (kind != "base"))
    if len(rest) < 2:
        raise TableError(f"{table.path}: fewer than 2 rows beside each model's one-GPU row")
    wanted = min(8, len(rest) // 2) if wanted is None else wanted
    if wanted >= len(rest):
        raise TableError(f"{table.path}: --calibrate-rows {wanted} of {len(rest)} leaves nothing")
    learn = np.random.default_rng(seed).permutation(rest)[:wanted]
    usual = np.array([0.03, 0.05, 0.1, 0.5, 1.0])

    def residual(theta: np.ndarray) -> np.ndarray:
        mine = _ddp_model(theta, gpus[learn], base[learn], kind[learn])
        return np.concatenate([np.log(mine / step[learn]) / 0.05, 0.3 * (theta - usual) / usual])

    theta = least_squares(residual, usual, bounds=(_LOW, _HIGH), loss="soft_l1").x
    test = np.setdiff1d(rest, learn)
    predicted = _ddp_model(theta, gpus[test], base[test], kind[test])
    bounds = zip(DDP_NAMES, theta, _LOW, _HIGH, strict=True)
    constants = {
        n: {"value": v, "unit": "share", "low": lo, "high": hi, "meaning": DDP_MEANING[n]}
        for n, v, lo, hi in bounds
    }
    return {
        "rows": len(step),
        "calibrated": len(learn),
        "given": int((kind == "base").sum()),
        "predicted": len(test),
        "time": errors(predicted, step[test]),
        "constants": constants,
        "models": len(set(names)),
    }


def _ddp_model(
    theta: np.ndarray, gpus: np.ndarray, base: np.ndarray, kind: np.ndarray
) -> np.ndarray:
    wrapper, inside, across, gather, slow = theta
    share = (gpus - 1) / gpus
    extra = wrapper + inside * share
    extra = np.where(kind == "across", wrapper + across * share, extra)
    extra = np.where(kind == "dp", gather * share, extra)
    extra = np.where(kind == "slow", wrapper + slow * share, extra)
    return base * (1 + extra)


def _ddp_rows(
    table: Table,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """(seconds, GPUs, one GPU's seconds, kind of row, model) of every row."""
    gpus = table.numbers("gpus", 1.0)
    step = table.numbers("iter_s_p50")
    batch = table.numbers("mbs", 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        step = np.where(np.isfinite(step), step, batch / table.numbers("ex_s_per_gpu"))
        step = np.where(np.isfinite(step), step, 1 / table.numbers("steps_s"))
    names = [f"{m} {s} {b}" for m, s, b in zip(
        table.text("model"), table.text("seq"), table.text("mbs"), strict=True)]  # fmt: skip
    strategy = [s.strip().lower() for s in table.text("strategy")]
    config = [s.strip().lower() for s in table.text("config")]
    kind = np.array(["inside"] * len(table), dtype=object)
    for i, (s, text) in enumerate(zip(strategy, config, strict=True)):
        if "no_nvlink" in s or "no nvlink" in text:
            kind[i] = "slow"
        elif s == "dp":
            kind[i] = "dp"
        elif "/" in text and not text.startswith("1m"):
            kind[i] = "across"
    base = np.full(len(table), np.nan)
    for name in set(names):
        rows = [i for i, n in enumerate(names) if n == name and np.isfinite(step[i])]
        alone = [i for i in rows if strategy[i] == "single"] or [i for i in rows if gpus[i] == 1]
        if alone:
            base[[i for i, n in enumerate(names) if n == name]] = step[alone[0]]
            kind[alone[0]] = "base"
    return step, gpus, base, kind.astype(str), names
