"""Fit a machine's constants on published runs: how the shipped profiles were made.

fitted(load("bare.json"), ["runs.csv"], "A100")
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np

from pardemo.predict.columns import finish, take
from pardemo.predict.constants import TIME
from pardemo.predict.fit import fit
from pardemo.predict.physics import seconds
from pardemo.predict.profile import Profile
from pardemo.predict.runs import runs
from pardemo.predict.tables import TableError, read


def published() -> Path:
    """The table of published runs that comes with the package: three papers, 21 runs, cited."""
    return Path(str(resources.files("pardemo.predict") / "published.csv"))


def fitted(profile: Profile, tables: Iterable[str | Path], machine: str) -> Profile:
    """`profile` with constants fitted on the rows of `tables` whose GPU's name has `machine`.

    Its residual is the spread of those rows around the fit; its reach their largest node count.
    TableError when no row is left.
    """
    parts, times = [], []
    for path in tables:
        data = runs(read(path))
        mine = np.array([machine.lower() in str(g).lower() for g in data.group])
        mine &= data.ran & np.isfinite(data.seconds)
        parts.append(take(data.columns, np.flatnonzero(mine)))
        times.append(data.seconds[mine])
    measured = np.concatenate(times)
    if len(measured) == 0:
        raise TableError(f"no run on {machine} among {[str(t) for t in tables]}")
    keys = set.union(*(set(p) for p in parts))
    n = [len(t) for t in times]
    joined = {
        k: np.concatenate([p.get(k, np.zeros(m)) for p, m in zip(parts, n, strict=True)])
        for k in keys
    }
    rows = finish(joined, joined["per_node"])
    found = fit(seconds, TIME, rows, measured)
    error = np.abs(seconds(rows, found.theta) / measured - 1)
    return replace(
        profile,
        constants=found.values(),
        residual={"median": float(np.median(error)), "p90": float(np.quantile(error, 0.9))},
        calibrated={
            "max_nodes": float(rows["nodes"].max()),
            "max_ranks": float(rows["ranks"].max()),
            "runs": float(len(measured)),
        },
    )
