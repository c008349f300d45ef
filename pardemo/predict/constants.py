"""The physical constants of a machine and its software, each with a unit and sane bounds.

Calibration moves these and nothing else. A value outside its bounds is impossible physics (an
efficiency above 1, a link faster than its specification), so the fit may not go there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Constant:
    """One constant: its unit, bounds, usual value, and `spread`: the prior's log deviation."""

    name: str
    unit: str
    low: float
    usual: float
    high: float
    spread: float
    meaning: str

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.usual <= self.high:
            raise ValueError(f"{self.name}: bounds {self.low}, {self.usual}, {self.high}")

    def __repr__(self) -> str:
        return f"{self.name} {self.usual:g} {self.unit} in [{self.low:g}, {self.high:g}]"


def vector(constants: Sequence[Constant], values: Mapping[str, float] | None = None) -> np.ndarray:
    """Logs of the constants' values, usual ones where `values` says nothing."""
    given = dict(values or {})
    unknown = set(given) - {c.name for c in constants}
    if unknown:
        raise ValueError(f"unknown constants {sorted(unknown)}")
    out = []
    for c in constants:
        v = float(given.get(c.name, c.usual))
        if not c.low * 0.999 <= v <= c.high * 1.001:
            raise ValueError(f"{c.name} = {v:g} {c.unit} is outside [{c.low:g}, {c.high:g}]")
        out.append(np.log(min(max(v, c.low), c.high)))
    return np.array(out)


def named(constants: Sequence[Constant], theta: np.ndarray) -> dict[str, float]:
    """The inverse of `vector`: names to values."""
    return {c.name: float(v) for c, v in zip(constants, np.exp(theta), strict=True)}


TIME = (
    Constant("matmul_efficiency", "of peak", 0.15, 0.75, 0.95, 0.25, "large matrix products"),
    Constant("half_tokens", "tokens", 1, 200, 4096, 1.0, "rows at which a product halves its rate"),
    Constant("half_width", "columns", 1, 60, 2048, 1.0, "columns at which it halves its rate"),
    Constant("layer_launch_s", "s", 2e-5, 8e-4, 2e-2, 0.8, "time to issue one layer's forward"),
    Constant("memory_bandwidth", "of peak", 0.1, 0.65, 0.95, 0.35, "element-wise work"),
    Constant("tp_latency_s", "s/rank", 5e-7, 1.5e-5, 2e-3, 1.0, "one collective inside a node"),
    Constant("node_bandwidth", "of link", 0.05, 0.6, 1.6, 0.5, "bus bandwidth inside a node"),
    Constant("net_latency_s", "s/rank", 1e-6, 2e-5, 2e-3, 1.0, "one collective between nodes"),
    Constant("net_bandwidth", "of link", 0.02, 0.6, 1.6, 0.6, "bus bandwidth between nodes"),
    Constant("net_half_nodes", "nodes", 1, 60, 1e4, 1.0, "nodes at which it has halved"),
    Constant("dp_exposed", "share", 0.05, 0.8, 1.5, 0.5, "gradient traffic that is not hidden"),
    Constant("p2p_latency_s", "s", 1e-6, 2e-4, 5e-2, 1.0, "one send between stages"),
    Constant("p2p_net_latency_s", "s", 2e-6, 5e-4, 3e-1, 1.2, "one send between nodes"),
    Constant("p2p_stall_s", "s", 1e-7, 1e-4, 2.0, 2.5, "one send in the slow mode of the network"),
    Constant("p2p_stall_nodes", "nodes", 4, 200, 1e4, 1.0, "nodes at which sends turn slow"),
    Constant("unsharded_stall", "share", 0.01, 0.1, 1.0, 1.5, "slow sends by unsharded replicas"),
    Constant("pipelined_latency", "times", 1, 1.5, 20, 0.6, "small collectives under a pipeline"),
    Constant("p2p_bandwidth", "of link", 0.02, 0.3, 1.2, 0.8, "send between stages"),
    Constant("float8_gain", "times", 1, 1.4, 2, 0.3, "large products in float8 against 16 bits"),
    Constant("compiled_gain", "times", 1, 1.25, 2, 0.2, "layers after torch.compile"),
    Constant("async_tp_left", "share", 0.05, 0.5, 1, 0.5, "tensor transfers left under async TP"),
    Constant("full_memory_slowdown", "share", 0.01, 1, 12, 1.0, "extra time with memory full"),
    Constant("microbatch_s", "s", 1e-6, 1e-3, 5e-2, 1.0, "fixed cost of a microbatch"),
    Constant("step_s", "s", 1e-5, 1e-2, 1.0, 1.0, "fixed cost of an optimiser step"),
    Constant("optimizer_bytes", "B/parameter", 4, 30, 200, 0.6, "memory moved by the optimiser"),
    Constant("rank_step_s", "s/rank", 1e-8, 1e-5, 1e-2, 1.5, "step cost that grows with ranks"),
)

MEMORY = (
    Constant("state_bytes", "B/parameter", 2, 6, 20, 0.5, "weights, gradients and their copies"),
    Constant("optimizer_state_bytes", "B/parameter", 2, 12, 20, 0.3, "master copy and moments"),
    Constant("hidden_bytes", "B/(token hidden)", 1, 18, 80, 0.6, "activations sharded by tp"),
    Constant("ffn_bytes", "B/(token ffn)", 0.5, 8, 40, 0.6, "activations of the MLP"),
    Constant("replicated_bytes", "B/(token hidden)", 1e-3, 0.5, 40, 1.2, "what tp does not shard"),
    Constant("logits_bytes", "B/(token vocab)", 1, 10, 40, 0.5, "logits, their float32, gradient"),
    Constant("fixed_bytes", "B", 1e7, 6e8, 8e9, 1.0, "buffers that depend on nothing"),
)
