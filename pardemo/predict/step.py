"""Predict the time of one optimiser step, term by term, with an interval.

`step(model, layout, profile)` for a transformer on a cluster; `step("ddp", profile=..., ...)` for a
strategy on a calibrated machine (see `strategy_step.py`). Both refuse, in words, what the profile
cannot support: constants fitted on 4 nodes say nothing about 64.
"""

from __future__ import annotations

import numpy as np

from pardemo.predict.columns import Columns, columns
from pardemo.predict.constants import TIME, vector
from pardemo.predict.model import Layout, Transformer
from pardemo.predict.physics import TERMS, seconds, terms
from pardemo.predict.prediction import Prediction, Term
from pardemo.predict.profile import Profile, ProfileError, load
from pardemo.predict.strategy_step import Refused, strategy_step

# beyond this many times the calibrated nodes a prediction is refused: fitted on 4 nodes or fewer
# and carried to 16 or more, published predictions were wrong by 154 % and worse
FURTHEST = 4.0
UNKNOWN_RESIDUAL = {"median": 0.15, "p90": 0.35}


def machine_columns(c: Columns, profile: Profile, dtype: str = "bfloat16") -> Columns:
    """Add the profile's peak, memory and link speeds to every row; ProfileError if absent."""
    n = len(c["hidden"])
    if profile.memory_bandwidth <= 0:
        raise ProfileError(f"{profile.name}: memory_bandwidth is missing; calibrate it")
    node = profile.links.get("node", 0.0)
    net = profile.links.get("network", 0.0)
    if node <= 0 and (c["ranks"] > 1).any():
        raise ProfileError(f"{profile.name}: links.node is missing; calibrate collectives")
    if net <= 0 and (c["nodes"] > 1).any():
        raise ProfileError(f"{profile.name}: links.network is missing: it knows one node only")
    facts = {"peak": profile.peak(dtype), "hbm": profile.memory_bandwidth}
    facts |= {"node_link": max(node, 1.0), "net_link": max(net, 1.0)}
    return c | {k: np.full(n, v) for k, v in facts.items()}


def reach(profile: Profile, nodes: int) -> str:
    """Evidence for a run on `nodes` nodes; Refused when that is too far from the calibration."""
    most = float(profile.calibrated.get("max_nodes", 1))
    if nodes > FURTHEST * most and nodes > 1:
        raise Refused(
            f"{nodes} nodes is more than {FURTHEST:g} times the {most:g} that {profile.cite} was "
            f"calibrated on: no prediction. Measure on {int(np.ceil(nodes / FURTHEST))} nodes."
        )
    if nodes > most:
        return f"extrapolated: {nodes} nodes, {profile.cite} reaches {most:g}"
    return profile.cite


def step(
    what: Transformer | str,
    layout: Layout | None = None,
    profile: Profile | str | None = None,
    *,
    dtype: str = "bfloat16",
    **knobs: object,
) -> Prediction:
    """Seconds of one optimiser step.

    step(model, layout, profile) or step("ddp", profile=profile, ranks=2, compute_s=..., sent=...).
    The interval is the profile's 90 % residual. Refused (a ValueError) when the profile does not
    reach that far; ProfileError when it lacks a part; ValueError when a stage would be empty.
    """
    if profile is None:
        raise ValueError("step needs profile=: a Profile, a file, or a shipped name")
    known = profile if isinstance(profile, Profile) else load(profile)
    if isinstance(what, str):
        return strategy_step(what, known, **knobs)  # type: ignore[arg-type]
    if knobs:
        raise TypeError(f"unknown arguments {sorted(knobs)} for a transformer and a layout")
    layout = layout or Layout()
    c = machine_columns(columns(what, [layout], known.per_node), known, dtype)
    if c["empty_stages"][0] > 0:
        raise ValueError(f"{layout.pp} stages for {what.layers} layers: a stage would be empty")
    evidence = reach(known, int(c["nodes"][0]))
    found = terms(c, vector(TIME, known.constants))
    parts = tuple(
        Term(name, TERMS[name], float(value[0]), "s", evidence)
        for name, value in found.items()
        if value[0] > 0
    )
    value = sum(t.value for t in parts)
    spread = (known.residual or UNKNOWN_RESIDUAL)["p90"]
    warnings = () if known.constants else (f"{known.name} has no fitted constants: usual values",)
    text = f"step of {what.name}, {layout!r}"
    tokens = layout.global_batch * what.seq
    notes: dict[str, float | str] = {"tokens_per_s_per_rank": tokens / value / layout.ranks}
    return Prediction(text, parts, "s", value / (1 + spread), value * (1 + spread), warnings, notes)


def step_seconds(c: Columns, profile: Profile, dtype: str = "bfloat16") -> np.ndarray:
    """Seconds for many rows at once, no terms, no refusal: for ranking layouts."""
    return seconds(machine_columns(c, profile, dtype), vector(TIME, profile.constants))
