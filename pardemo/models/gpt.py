"""A decoder-only transformer in the shape of GPT-2 (Radford 2019), any size.

Shape letters: B batch, T tokens, D n_embd, H heads on this rank, K head size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT; the defaults make a small one, `GPTConfig.gpt2()` the published one."""

    vocab_size: int = 256
    block_size: int = 64
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    bias: bool = False
    tied: bool = True

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")

    @classmethod
    def gpt2(cls, dropout: float = 0.0) -> GPTConfig:
        """The smallest GPT-2: 124,439,808 parameters (it was trained with dropout=0.1)."""
        return cls(50257, 1024, n_layer=12, n_head=12, n_embd=768, dropout=dropout, bias=True)


class Embedding(nn.Module):
    """Token plus position embedding.

    `positions` (T,) says where this rank's tokens stand when the sequence is split over ranks;
    None means 0, 1, 2, ...
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tok = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.positions: torch.Tensor | None = None

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """(B, T) integers -> (B, T, D)."""
        where = self.positions
        if where is None:
            if tokens_BT.shape[1] > self.pos.num_embeddings:
                raise ValueError(
                    f"{tokens_BT.shape[1]} tokens exceed block_size={self.pos.num_embeddings}"
                )
            where = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        return self.drop(self.tok(tokens_BT) + self.pos(where))


def causal_attention(
    q_BHTK: torch.Tensor, k_BHTK: torch.Tensor, v_BHTK: torch.Tensor, dropout: float
) -> torch.Tensor:
    """Softmax attention in which no token sees a later one."""
    return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, dropout_p=dropout, is_causal=True)


class Attention(nn.Module):
    """Causal self-attention with one Linear each for queries, keys, values and output.

    Heads are counted from what wq returns, so the columns of wq, wk, wv and the rows of wo may be
    split over ranks by whole heads. `attend` may be replaced, as context parallelism does.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        d, bias = config.n_embd, config.bias
        self.wq, self.wk, self.wv = (nn.Linear(d, d, bias=bias) for _ in range(3))
        self.wo = nn.Linear(d, d, bias=bias)
        self.drop = nn.Dropout(config.dropout)
        self.head_size, self.dropout = d // config.n_head, config.dropout
        self.attend = causal_attention

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        b, t, _ = x_BTD.shape
        q, k, v = (
            w(x_BTD).view(b, t, -1, self.head_size).transpose(1, 2)
            for w in (self.wq, self.wk, self.wv)
        )
        mixed_BHTK = self.attend(q, k, v, self.dropout if self.training else 0.0)
        return self.drop(self.wo(mixed_BHTK.transpose(1, 2).reshape(b, t, -1)))


class FeedForward(nn.Module):
    """Linear D -> 4D, GELU, Linear 4D -> D."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.drop(self.down(F.gelu(self.up(x_BTD), approximate="tanh")))


class Block(nn.Module):
    """Attention, then feed-forward; each behind a LayerNorm and added to its input."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp: nn.Module = FeedForward(config)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        x_BTD = x_BTD + self.attn(self.norm1(x_BTD))
        return x_BTD + self.mlp(self.norm2(x_BTD))


class GPT(nn.Module):
    """Embedding, blocks, LayerNorm, head; the head is the token embedding again when `tied`."""

    def __init__(self, config: GPTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GPTConfig()
        self.embed = Embedding(config)
        self.blocks = nn.ModuleList(self.make_block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(_initialise)
        for name, parameter in self.named_parameters():
            if name.endswith(("wo.weight", "down.weight")):  # Radford 2019, section 2.3
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
        if config.tied:
            self.head.weight = self.embed.tok.weight

    def make_block(self, config: GPTConfig) -> nn.Module:
        """One block; a subclass may build another kind."""
        return Block(config)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """(B, T) tokens -> (B, T, V) logits."""
        x = tokens_BT
        for _, piece in self.sequence():
            x = piece(x)
        return x

    def sequence(self) -> list[tuple[str, nn.Module]]:
        """Embedding, blocks, norm and head, in order: their composition is `forward`."""
        middle = [(f"blocks.{i}", block) for i, block in enumerate(self.blocks)]
        return [("embed", self.embed), *middle, ("norm", self.norm), ("head", self.head)]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
