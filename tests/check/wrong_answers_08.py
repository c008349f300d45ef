"""Wrong answers to the checks of lesson 08; each must be told "not yet"."""

from __future__ import annotations

WRONG = {
    "kept_bytes": [
        lambda stage, parameters, n: 16 * parameters / n,
        lambda stage, parameters, n: parameters * (16 - 4 * stage) / n,
        lambda stage, parameters, n: parameters * (8 + 8 / n),
    ],
    "fsdp_bytes": [
        lambda parameters, root, n, m: 4 * 3 * (n - 1) / n * parameters,
        lambda parameters, root, n, m: 4 * m * (n - 1) / n * (3 * parameters - root),
        lambda parameters, root, n, m: 4 * (n - 1) / n * (m * 2 * parameters + parameters),
    ],
    "whole_norm": [
        sum,
        max,
        lambda norms: sum(norm**2 for norm in norms),
    ],
}
