"""Floating-point operations of a training step, with the convention as a recorded field.

The same run is reported at 33 % or 39 % of the peak depending on what is counted. So every number
here carries a `Convention`: is the embedding counted, is the causal mask, is recomputation.
A multiply-add is 2. Sources: Narayanan 2021 equation 3, Chowdhery 2022 (PaLM) appendix B,
Hoffmann 2022 (6N; Kaplan 2020 without embeddings), Korthikanti 2022 (selective recomputation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pardemo.predict.model import Transformer
from pardemo.predict.prediction import human


@dataclass(frozen=True)
class Convention:
    """What a FLOP count counts; two counts compare only where these agree."""

    name: str
    head: bool = True
    input_embedding: bool = False
    causal_halved: bool = False
    attention: bool = True
    recompute: str = "none"
    source: str = ""


EXACT = Convention("exact", source="counted matrix products, mask ignored")
MEGATRON = Convention("megatron", recompute="full", source="Narayanan 2021, eq. 3 (factor 96)")
MEGATRON_MODEL = Convention("megatron-model", source="Narayanan 2021, eq. 3 with factor 72")
PALM = Convention("palm", head=True, source="Chowdhery 2022, appendix B: 6N + 12 L H Q T")
PALM_EMBEDDED = Convention(
    "palm-embedded", input_embedding=True, source="appendix B with the untied input table in N"
)
SIX_N = Convention(
    "6n", attention=False,
    source="Hoffmann 2022: 6 per parameter and token (Kaplan 2020 leaves the embeddings out of N)",
)  # fmt: skip
CONVENTIONS = {c.name: c for c in (EXACT, MEGATRON, MEGATRON_MODEL, PALM, PALM_EMBEDDED, SIX_N)}


@dataclass(frozen=True)
class Flops:
    """A count of floating-point operations and the convention it was made under."""

    value: float
    convention: Convention
    what: str

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        return f"{human(self.value, 'flops')} {self.what} ({self.convention.name} convention)"


def forward_per_token(m: Transformer, causal_halved: bool = False) -> tuple[float, float, float]:
    """(projections, attention scores, head) FLOPs of one token's forward pass, all layers.

    Per layer: 2 h^2 (2 + 2 kv/heads) projections, 2 k h f MLP (k matrices, `top_k` experts),
    4 s h scores (2 s h when the causal half is not counted); 2 h V for the head.
    """
    h, f = m.hidden, m.ffn
    mlp = 2 * m.matrices * h * f * (m.top_k if m.experts else 1) + 2 * h * m.experts
    dense = 2 * h * h * (2 + 2 * m.kv / m.heads) + mlp
    scores = (2 if causal_halved else 4) * m.seq * h
    return float(m.layers * dense), float(m.layers * scores), 2.0 * h * m.vocab


def train_per_token(m: Transformer, convention: Convention = EXACT) -> float:
    """Training FLOPs of one token: 3 times forward, 4 with full recomputation of the layers."""
    if convention.name.startswith("palm"):
        table = m.vocab * m.hidden
        n = m.active_parameters - m.embedding_parameters - m.hidden - 2 * m.hidden * m.layers
        n += table * (2 if convention.input_embedding else 1)
        return 6.0 * n + 12.0 * m.layers * m.hidden * m.seq
    if convention.name == "6n":
        return 6.0 * m.active_parameters
    dense, scores, head = forward_per_token(m, convention.causal_halved)
    layers = dense + (scores if convention.attention else 0.0)
    again = {"none": 3, "selective": 3, "full": 4}[convention.recompute]
    extra = scores if convention.recompute == "selective" else 0.0
    # Megatron's equation multiplies the head by 3 in both forms: 6 B s h V
    total = again * layers + extra + (3 * head if convention.head else 0.0)
    return total + (6.0 * m.vocab * m.hidden if convention.input_embedding else 0.0)


def step_flops(m: Transformer, global_batch: int, convention: Convention = EXACT) -> Flops:
    """FLOPs of one optimiser step on `global_batch` sequences."""
    total = train_per_token(m, convention) * m.seq * global_batch
    return Flops(total, convention, f"for one step of {global_batch} x {m.seq} tokens")


def megatron_eq3(
    layers: int, hidden: int, vocab: int, seq: int, batch: int, recompute: bool = True
) -> float:
    """Narayanan 2021, equation 3: 96 B s l h^2 (1 + s/6h + V/16lh), 72 without recomputation.

    Without recomputation the head's share is V/12lh: the 96 form counts it as 6 B s h V too.
    """
    common = batch * seq * layers * hidden * hidden
    if recompute:
        return 96.0 * common * (1 + seq / (6 * hidden) + vocab / (16 * layers * hidden))
    return 72.0 * common * (1 + seq / (6 * hidden) + vocab / (12 * layers * hidden))


def linear_train(sizes: Sequence[int], batch: int, input_gradient: bool = False) -> float:
    """A chain of linear layers d0 -> d1 -> ...: 2B(3 sum d_i d_{i+1} - d_0 d_1).

    The first layer's input gradient is not computed, unless `input_gradient`.
    """
    pairs = [a * b for a, b in pairwise(sizes)]
    return 2.0 * batch * (3 * sum(pairs) - (0 if input_gradient else pairs[0]))


def mfu(flops: float, seconds: float, ranks: int, peak_flops: float) -> float:
    """Share of the peak: model FLOPs / (seconds x ranks x peak). HFU when `flops` has recompute."""
    if min(seconds, ranks, peak_flops) <= 0:
        raise ValueError("seconds, ranks and peak_flops must be positive")
    return flops / (seconds * ranks * peak_flops)
