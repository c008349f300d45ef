"""Wrong answers to the checks of lesson 11; each must be told "not yet"."""

from __future__ import annotations

WRONG = {
    "link_s": [
        lambda parameters, n, rate: 2 * (n - 1) / n * 4 * parameters / rate,
        lambda parameters, n, rate: 4 * parameters * 8 / rate,
    ],
    "meet_every": [
        lambda compute, transfer, share: int(transfer / (compute * share)),
        lambda compute, transfer, share: 1,
    ],
    "global_rank": [
        lambda node, local, per_node: local * per_node + node,
        lambda node, local, per_node: node + local,
    ],
}
