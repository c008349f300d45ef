"""Predict: say what a step costs before it is measured, term by term, with an interval.

Closed forms
    sent_bytes(strategy, ...) -> SentBytes      bytes per rank and step, by collective kind
    memory(model, layout) | memory(strategy, parameters=..., ranks=...) -> Prediction
    step_flops(model, global_batch, convention) -> Flops
    schedule(name, ranks, microbatches, ...) -> Schedule     simulated tick by tick
From a calibrated machine
    Profile, load(path_or_name), shipped()      JSON, dated; "a100-dgx" and "h100-dgx" ship
    step(model, layout, profile) | step(strategy, profile=..., ...) -> Prediction
    layouts(model, cluster) -> Plan             ranked, top 3 with intervals and ties
    score(path, calibrate_rows, seed) -> Score  predictions against a table of published runs

Numpy and scipy only: nothing here can see a measurement it is about to predict.
"""

from __future__ import annotations

from pardemo.predict.collectives import AlphaBeta, Curve, CurveSet, fit_alpha_beta
from pardemo.predict.fitted import fitted, published
from pardemo.predict.flops import (
    CONVENTIONS,
    Convention,
    Flops,
    linear_train,
    megatron_eq3,
    mfu,
    step_flops,
    train_per_token,
)
from pardemo.predict.layouts import Choice, Plan, layouts
from pardemo.predict.memory import memory
from pardemo.predict.model import MODELS, Cluster, Layers, Layout, Transformer, model
from pardemo.predict.prediction import Prediction, Term
from pardemo.predict.profile import SCHEMA, Profile, ProfileError, load, shipped, validate
from pardemo.predict.schedules import (
    Schedule,
    ScheduleError,
    Span,
    bubble_formula,
    schedule,
    simulate,
)
from pardemo.predict.score import Score, score
from pardemo.predict.sent import Message, SentBytes, padded, sent_bytes
from pardemo.predict.step import Refused, step
from pardemo.predict.strategy_step import compute_seconds
from pardemo.predict.tables import TableError
from pardemo.predict.wire import broadcast_copies, wire_bytes, wire_factor

__all__ = [
    "CONVENTIONS",
    "MODELS",
    "SCHEMA",
    "AlphaBeta",
    "Choice",
    "Cluster",
    "Convention",
    "Curve",
    "CurveSet",
    "Flops",
    "Layers",
    "Layout",
    "Message",
    "Plan",
    "Prediction",
    "Profile",
    "ProfileError",
    "Refused",
    "Schedule",
    "ScheduleError",
    "Score",
    "SentBytes",
    "Span",
    "TableError",
    "Term",
    "Transformer",
    "broadcast_copies",
    "bubble_formula",
    "compute_seconds",
    "fit_alpha_beta",
    "fitted",
    "layouts",
    "linear_train",
    "load",
    "megatron_eq3",
    "memory",
    "mfu",
    "model",
    "padded",
    "published",
    "schedule",
    "score",
    "sent_bytes",
    "shipped",
    "simulate",
    "step",
    "step_flops",
    "train_per_token",
    "validate",
    "wire_bytes",
    "wire_factor",
]
