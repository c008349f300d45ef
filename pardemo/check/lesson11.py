"""Checks of lesson 11: what a slow link costs, how seldom to meet, which rank lives where."""

from __future__ import annotations

import math
from collections.abc import Callable

from pardemo.check.verdict import demand, verdict


@verdict
def link_s(answer: Callable[[int, int, float], float]) -> str:
    """`answer(parameters, n, rate_bits)`: seconds one all-reduce of float32 gradients needs."""
    demand(answer(1_000, 1, 1e8), 0, "One rank has nobody to send to.")
    for parameters, n, rate in ((1_000_000, 2, 1e8), (1_000_000, 8, 1e9), (124_439_808, 16, 1e10)):
        expected = 2 * (n - 1) / n * 4 * parameters * 8 / rate
        demand(
            answer(parameters, n, rate),
            expected,
            f"{parameters:,} parameters on {n} nodes at {rate / 1e6:,.0f} Mbit/s: each sends "
            "2(n-1)/n x 4 bytes per parameter, and a byte is 8 bits.",
        )
    return "at 100 Mbit/s a million parameters cost a third of a second"


@verdict
def meet_every(answer: Callable[[float, float, float], int]) -> str:
    """`answer(compute_s, transfer_s, share)`: the least steps between meetings."""
    for compute, transfer, share in ((0.1, 1.0, 0.1), (0.1, 0.005, 0.1), (0.02, 0.28, 0.2)):
        expected = max(1, math.ceil(transfer / (compute * share) - 1e-9))
        demand(
            answer(compute, transfer, share),
            expected,
            f"compute {compute} s, transfer {transfer} s: over k steps the transfer may be at most "
            f"{share:.0%} of k x compute; k is a whole number, at least 1.",
        )
    return "the rarer the meetings, the smaller their share"


@verdict
def global_rank(answer: Callable[[int, int, int], int]) -> str:
    """`answer(node_rank, local_rank, nproc_per_node)`: the rank in the world."""
    for node, local, per_node in ((0, 0, 4), (0, 3, 4), (1, 0, 4), (2, 1, 8)):
        demand(
            answer(node, local, per_node),
            node * per_node + local,
            f"node {node}, local rank {local}, {per_node} per node: all ranks of earlier nodes "
            "come first.",
        )
    return "ranks of one node are neighbours"
