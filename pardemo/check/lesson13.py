"""Checks of lesson 13: bytes with and without no_sync, the batch that hides a transfer, MFU."""

from __future__ import annotations

from collections.abc import Callable

from pardemo.check.verdict import demand, verdict


@verdict
def reduced_bytes(answer: Callable[[int, int, bool], float]) -> str:
    """`answer(parameters, microbatches, no_sync)`: fp32 gradient bytes all-reduced per step."""
    demand(answer(1_000, 1, False), 4_000, "One microbatch: every gradient once, 4 bytes each.")
    demand(answer(1_000, 8, False), 32_000, "Without no_sync every backward all-reduces.")
    demand(answer(1_000, 8, True), 4_000, "With no_sync only the last backward does.")
    return f"of gpt2, 8 microbatches: {answer(124_439_808, 8, False) / 1e9:.1f} GB instead of 0.5"


@verdict
def samples_to_hide(answer: Callable[[float, float], int]) -> str:
    """`answer(transfer_s, backward_s_per_sample)`: the fewest samples whose backward is as long."""
    hint = "The backward of b samples takes b times as long as that of one; round up."
    for transfer_s, each_s, expected in ((0.010, 0.002, 5), (0.011, 0.002, 6), (0.001, 0.002, 1)):
        demand(answer(transfer_s, each_s), expected, hint)
    return "below this batch the transfer shows; above it, it can hide (where it has its own core)"


@verdict
def mfu(answer: Callable[[float, float, float, int, float, bool], float]) -> str:
    """`answer(parameters, tokens, step_s, devices, peak, recompute)`: model FLOPs utilisation."""
    plain = answer(1e9, 1e6, 10.0, 8, 1e14, False)
    demand(
        plain, 6e15 / 10 / 8e14, "6 FLOPs per parameter and token, over the peak of ALL devices."
    )
    demand(
        answer(1e9, 1e6, 10.0, 8, 1e14, True),
        plain,
        "MFU counts what the model needs; what is computed twice counts in HFU only.",
    )
    return "recomputing memory away costs time, and must not look like progress"
