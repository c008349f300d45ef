"""FLOP and parameter formulae against a table's own numbers, each with its convention."""

from __future__ import annotations

from typing import Any

import numpy as np

from pardemo.predict.columns import Columns
from pardemo.predict.flops import megatron_eq3
from pardemo.predict.runs import runs
from pardemo.predict.stats import errors
from pardemo.predict.tables import Table


def flop_stats(table: Table) -> dict[str, Any]:
    """What the table states (FLOPs per token, TFLOP/s per GPU, parameters) against the formulae.

    Megatron's equations 2 and 3 for GPT blocks (recomputation counted); for gated blocks PaLM's
    count per token, and the matrix products with the causal half left out for TFLOP/s.
    """
    data = runs(table)
    index = np.array([table.lines.index(r) for r in data.rows])
    c = data.columns
    gated = c["matrices"] == 3
    out: dict[str, Any] = {}

    def check(name: str, mine: np.ndarray, stated: np.ndarray, convention: str) -> None:
        good = np.isfinite(stated) & np.isfinite(mine) & (stated > 0)
        if good.any():
            found = errors(mine[good], stated[good])
            kept = {k: found[k] for k in ("rows", "median_error", "worst_error")}
            out[name] = kept | {"convention": convention}

    per_token = table.numbers("flops_per_token")[index]
    check("flops_per_token", palm(c), per_token, "palm")
    stated = table.numbers("tflops_per_gpu")[index] * 1e12
    rate = data.tokens / data.seconds / c["ranks"]
    check("tflops_per_gpu", megatron(c) * rate, np.where(gated, np.nan, stated), "megatron")
    check("tflops_gated", halved(c) * rate, np.where(gated, stated, np.nan), "causal half left out")
    text = [table.text("params_b")[i] for i in index] if table.has("params_b") else []
    if text:
        sizes = table.numbers("params_b")[index]
        mine = np.array([_as_stated(p / 1e9, t) for p, t in zip(parameters(c), text, strict=True)])
        check("params_b", mine, sizes, "as many digits as stated")
    return out


def palm(c: Columns) -> np.ndarray:
    """Chowdhery 2022, appendix B: 6 N + 12 L h s per token, N with the head, without the input."""
    n = c["layers"] * c["active_p"] + c["table_p"]
    return 6 * n + 12 * c["layers"] * c["hidden"] * c["seq"]


def halved(c: Columns) -> np.ndarray:
    """The same with half of the attention scores: what a causal kernel computes."""
    return palm(c) - 6 * c["layers"] * c["hidden"] * c["seq"]


def megatron(c: Columns) -> np.ndarray:
    """Narayanan 2021, equation 3, per token, with full recomputation."""
    out = []
    for layers, hidden, vocab, seq in zip(
        c["layers"], c["hidden"], c["vocab"], c["seq"], strict=True
    ):
        out.append(megatron_eq3(int(layers), int(hidden), int(vocab), int(seq), 1) / seq)
    return np.array(out)


def parameters(c: Columns) -> np.ndarray:
    """Narayanan 2021, equation 2, for GPT blocks; weights, norms and two tables for gated ones."""
    h, layers = c["hidden"], c["layers"]
    corrections = 13 / (12 * h) + (c["vocab"] + c["seq"]) / (12 * layers * h)
    gpt = 12 * layers * h * h * (1 + corrections)
    return np.where(c["matrices"] == 3, layers * c["layer_p"] + 2 * c["table_p"] + h, gpt)


def _as_stated(value: float, text: str) -> float:
    """`value` rounded to the digits of `text`: 1.66 against "1.7" is right."""
    decimals = len(text.split(".")[1].rstrip("0")) if "." in text else 0
    return round(value, decimals)
