"""Wrong answers to the checks of lesson 07; each must be told "not yet"."""

from __future__ import annotations

from typing import Any

WRONG: dict[str, list[Any]] = {
    "sent_bytes": [
        lambda batch, tokens, hidden, layers, t: 4 * layers * 4 * batch * tokens * hidden,
        lambda batch, tokens, hidden, layers, t: (
            2 * layers * 2 * (t - 1) / t * 4 * batch * tokens * hidden
        ),
        lambda *sizes: 0,
    ],
    "most_ranks": [
        lambda heads, hidden, available: min(heads, available),
        lambda heads, hidden, available: available,
    ],
    "row_linear": [
        lambda inputs, weights, bias: sum(
            x @ w.T + bias for x, w in zip(inputs, weights, strict=True)
        ),
        lambda inputs, weights, bias: inputs[0] @ weights[0].T + bias,
        lambda inputs, weights, bias: 0,
    ],
}
