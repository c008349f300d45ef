"""The few statistics a score prints: errors, rank correlation, regret, area under the curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def errors(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """Relative errors |p/m - 1|: count, median, p90, worst; bias is the median of p/m - 1."""
    if len(measured) == 0:
        return {"rows": 0}
    relative = predicted / measured - 1
    size = np.abs(relative)
    return {
        "rows": len(measured),
        "median_error": float(np.median(size)),
        "p90_error": float(np.quantile(size, 0.9)),
        "worst_error": float(size.max()),
        "bias": float(np.median(relative)),
        "rank_correlation": rank_correlation(predicted, measured),
    }


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; 1 for fewer than 3 values or no spread, where it says nothing."""
    from scipy.stats import rankdata  # not above: it takes a second, and only scoring needs it

    if len(a) < 3:
        return 1.0
    x, y = rankdata(a), rankdata(b)
    if x.std() == 0 or y.std() == 0:
        return 1.0
    return float(np.corrcoef(x, y)[0, 1])


def auc(score: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive row scores above a negative one; ties count half. nan if one-sided."""
    from scipy.stats import rankdata

    n1, n0 = int(positive.sum()), int((~positive).sum())
    if n1 == 0 or n0 == 0:
        return float("nan")
    ranks = rankdata(score)
    return float((ranks[positive].sum() - n1 * (n1 + 1) / 2) / n1 / n0)


def regret(
    group: np.ndarray, predicted: np.ndarray, measured: np.ndarray, fewest: int = 3
) -> dict[str, Any]:
    """Time of the pick / time of the best, per group of rivals with at least `fewest` rows.

    "pick" takes the row predicted fastest, "top3" the best of the three predicted fastest.
    """
    pick, top3, middle = [], [], []
    for name in np.unique(group):
        i = np.flatnonzero(group == name)
        if len(i) < fewest:
            continue
        order = i[np.argsort(predicted[i], kind="stable")]
        best = measured[i].min()
        pick.append(measured[order[0]] / best)
        top3.append(measured[order[:3]].min() / best)
        middle.append(np.median(measured[i]) / best)
    if not pick:
        return {"groups": 0}
    return {
        "groups": len(pick),
        "pick_median": float(np.median(pick)),
        "pick_worst": float(np.max(pick)),
        "top3_median": float(np.median(top3)),
        "top3_worst": float(np.max(top3)),
        "typical_layout_median": float(np.median(middle)),
    }


def percent(value: float) -> str:
    """0.0312 -> '3.1 %'."""
    return f"{100 * value:.1f} %"


def finite(value: Any) -> Any:
    """A copy that JSON can hold: nan and infinities become None, numpy numbers plain ones."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, str | bool) or value is None:
        return value
    if isinstance(value, Sequence | np.ndarray):
        return [finite(v) for v in value]
    number = float(value)
    if not np.isfinite(number):
        return None
    return int(number) if number == int(number) and abs(number) < 1e15 else number
