"""What is predicted about: a model's shape, a layout over the ranks, a cluster.

Three frozen dataclasses of plain numbers. `Transformer` is enough for language models;
`Layers` describes any model by its counted layers (pardemo.count fills it in).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

# the largest sizes that are taken for a model: a hundred times and more beyond any published one
LARGEST = {
    "layers": 100_000, "hidden": 10**7, "heads": 10**6, "ffn": 10**8, "vocab": 10**9, "seq": 10**9,
    "kv_heads": 10**6, "experts": 100_000, "top_k": 100_000,
}  # fmt: skip


@dataclass(frozen=True)
class Transformer:
    """A decoder's shape; `kv_heads` 0 means as many as `heads`, `gated` a three-matrix MLP."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    vocab: int
    seq: int
    kv_heads: int = 0
    gated: bool = False
    tied: bool = True
    learned_positions: bool = False
    experts: int = 0
    top_k: int = 1
    name: str = "transformer"

    def __post_init__(self) -> None:
        for key, most in LARGEST.items():
            least, size = 0 if key in ("kv_heads", "experts") else 1, getattr(self, key)
            if not least <= size <= most:
                said = f"at least {least}" if size < least else f"at most {most:,}"
                raise ValueError(f"{key} must be {said}, got {size:.6g}")
        if self.experts and self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is more than the {self.experts} experts")
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not divisible by {self.heads} heads")
        if self.heads % self.kv:
            raise ValueError(f"{self.heads} heads are not divisible by {self.kv} kv heads")

    @property
    def kv(self) -> int:
        """Key and value heads."""
        return self.kv_heads or self.heads

    @property
    def matrices(self) -> int:
        """Matrices in the MLP: 3 when gated (SwiGLU), else 2."""
        return 3 if self.gated else 2

    @property
    def attention_parameters(self) -> int:
        """Weights of one attention block, biases left out."""
        return int(self.hidden * self.hidden * (2 + 2 * self.kv / self.heads))

    @property
    def mlp_parameters(self) -> int:
        """Weights of one MLP (of one expert, where there are experts)."""
        return self.matrices * self.hidden * self.ffn

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer: attention, MLP or all experts and their router, two norms."""
        mlp = self.mlp_parameters * max(1, self.experts) + self.experts * self.hidden
        return self.attention_parameters + mlp + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding and, when untied, of the head."""
        table = self.vocab * self.hidden
        positions = self.seq * self.hidden if self.learned_positions else 0
        return table * (1 if self.tied else 2) + positions

    @property
    def parameters(self) -> int:
        """All weights; biases and the norms' shifts are left out (below 0.1 % at scale)."""
        return self.layers * self.layer_parameters + self.embedding_parameters + self.hidden

    @property
    def active_parameters(self) -> int:
        """Weights that one token meets: with experts only the `top_k` it is routed to."""
        idle = (self.experts - self.top_k) * self.mlp_parameters if self.experts else 0
        return self.parameters - self.layers * idle

    def __repr__(self) -> str:
        return (
            f"{self.name}: {self.parameters / 1e9:.2f} B parameters, {self.layers} layers, hidden "
            f"{self.hidden}, {self.heads} heads ({self.kv} kv), ffn {self.ffn}"
            f"{' gated' if self.gated else ''}, vocab {self.vocab}, seq {self.seq}"
        )


@dataclass(frozen=True)
class Layers:
    """Any model as a list of counted layers: per sample forward FLOPs, parameters, activations.

    `backward`: per sample FLOPs of the backward pass, twice the forward ones where nothing is
    given. A layer whose input needs no gradient has less.
    """

    names: tuple[str, ...]
    flops: tuple[float, ...]
    parameters: tuple[int, ...]
    activation_bytes: tuple[float, ...]
    output_bytes: tuple[float, ...]
    name: str = "model"
    kinds: tuple[str, ...] = ()
    backward: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.backward:
            object.__setattr__(self, "backward", tuple(2 * f for f in self.flops))
        sizes = {len(self.names), len(self.flops), len(self.parameters), len(self.backward)}
        sizes |= {len(self.activation_bytes), len(self.output_bytes)}
        if len(sizes) != 1:
            raise ValueError(f"every field needs one entry per layer, got lengths {sorted(sizes)}")

    @property
    def total_parameters(self) -> int:
        """Sum over the layers."""
        return sum(self.parameters)

    def __repr__(self) -> str:
        return (
            f"{self.name}: {len(self.names)} layers, {self.total_parameters:,} parameters, "
            f"{sum(self.flops) / 1e9:.4g} GFLOP forward per sample"
        )


RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Layout:
    """How a global batch of `microbatches x microbatch x dp` samples is spread over the ranks."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    microbatch: int = 1
    microbatches: int = 1
    zero: int = 0
    chunks: int = 1
    schedule: str = "1f1b"
    sequence_parallel: bool = True
    recompute: str = "none"
    bytes_per_element: int = 2
    mixed: bool = True

    def __post_init__(self) -> None:
        for key in ("dp", "tp", "pp", "cp", "ep", "microbatch", "microbatches", "chunks"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"zero is 0, 1, 2 or 3, got {self.zero}")
        if self.recompute not in RECOMPUTE:
            raise ValueError(f"recompute is one of {RECOMPUTE}, got {self.recompute!r}")
        if self.dp % self.ep:
            raise ValueError(
                f"experts live inside dp: dp {self.dp} is not divisible by ep {self.ep}"
            )

    @property
    def ranks(self) -> int:
        """World size: dp x tp x pp x cp (ep divides dp)."""
        return self.dp * self.tp * self.pp * self.cp

    @property
    def global_batch(self) -> int:
        """Samples per optimiser step."""
        return self.dp * self.microbatch * self.microbatches

    def __repr__(self) -> str:
        axes = [("dp", self.dp), ("tp", self.tp), ("pp", self.pp), ("cp", self.cp), ("ep", self.ep)]
        text = " x ".join(f"{k}{v}" for k, v in axes if v > 1) or "one rank"
        text += f", zero {self.zero}, {self.microbatches} microbatches of {self.microbatch}"
        if self.pp > 1:
            text += f", {self.schedule}" + (f" x{self.chunks}" if self.chunks > 1 else "")
        return text + ("" if self.recompute == "none" else f", recompute {self.recompute}")


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind: `ranks` in nodes of `per_node`, `memory_bytes` each, and a profile."""

    ranks: int
    per_node: int = 8
    memory_bytes: float = 80e9
    profile: str = "h100-dgx"
    name: str = "cluster"
    notes: tuple[str, ...] = field(default=())

    @property
    def nodes(self) -> int:
        """Number of nodes, the last one perhaps not full."""
        return math.ceil(self.ranks / self.per_node)

    def __repr__(self) -> str:
        return (
            f"{self.name}: {self.ranks} ranks in {self.nodes} nodes of {self.per_node}, "
            f"{self.memory_bytes / 1e9:.0f} GB each, profile {self.profile}"
        )


def _llama3(name: str, layers: int, hidden: int, heads: int, ffn: int) -> Transformer:
    return Transformer(
        layers, hidden, heads, ffn, 128256, 8192, 8, gated=True, tied=False, name=name
    )


MODELS = {
    "gpt2": Transformer(12, 768, 12, 3072, 50257, 1024, learned_positions=True, name="gpt2"),
    "gpt3-175b": Transformer(96, 12288, 96, 49152, 51200, 2048, name="gpt3-175b"),
    "llama3-8b": _llama3("llama3-8b", 32, 4096, 32, 14336),
    "llama3-70b": _llama3("llama3-70b", 80, 8192, 64, 28672),
    "llama3-405b": _llama3("llama3-405b", 126, 16384, 128, 53248),
}


def model(name: str, **changes: int | bool | str) -> Transformer:
    """A published shape by name, with some fields changed: model("llama3-8b", seq=4096)."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name[:80]!r}; known: {', '.join(MODELS)}")
    return replace(MODELS[name], **changes)  # type: ignore[arg-type]
