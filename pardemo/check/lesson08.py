"""Checks of lesson 08: what a stage keeps, what FSDP sends, the norm of a sharded gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pardemo.check.verdict import demand, verdict


@verdict
def kept_bytes(answer: Callable[[int, int, int], float]) -> str:
    """`answer(stage, parameters, n)`: bytes kept by one rank, float32 and Adam."""
    per_parameter = {0: (16, 0), 1: (8, 8), 2: (4, 12), 3: (0, 16)}  # whole, sharded
    for stage, (whole, sharded) in per_parameter.items():
        for parameters, n in ((1_000, 1), (1_000, 4), (7_000_000_000, 64)):
            demand(
                answer(stage, parameters, n),
                whole * parameters + sharded * parameters / n,
                f"Stage {stage}, {parameters:,} parameters, {n} ranks: {whole} bytes of each "
                f"parameter are kept whole and {sharded} are shared.",
            )
    return "stage 3 on 64 ranks keeps a quarter of a byte per parameter"


@verdict
def fsdp_bytes(answer: Callable[[int, int, int, int], float]) -> str:
    """`answer(parameters, root, n, m)`: bytes sent by one rank per optimiser step, float32."""
    for parameters, root, n, m in ((1_000, 0, 2, 1), (1_000, 200, 4, 1), (1_000, 200, 4, 3)):
        expected = 4 * (n - 1) / n * (m * (2 * parameters - root) + parameters)
        demand(
            answer(parameters, root, n, m),
            expected,
            f"{parameters} parameters, {root} in the root, {n} ranks, {m} microbatches: count the "
            "gathers per microbatch, and the reduce-scatter once.",
        )
    demand(answer(1_000, 0, 1, 4), 0, "One rank has nobody to send to.")
    return "accumulation saves reduce-scatters, never gathers"


@verdict
def whole_norm(answer: Callable[[Sequence[float]], float]) -> str:
    """`answer(norms)`: the norm of the gradient of which each rank knows its shard's norm."""
    for norms, expected in (([3.0, 4.0], 5.0), ([2.0], 2.0), ([1.0, 2.0, 2.0], 3.0)):
        demand(answer(norms), expected, f"Shards of norms {norms}: squares add up, norms do not.")
    return "one number per rank is all that clipping has to send"
