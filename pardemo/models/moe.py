"""A GPT whose feed-forward layers are mixtures of experts: every token visits k of E of them.

A linear gate gives every token E probabilities; the k largest choose its experts, whose outputs are
added with those weights (Shazeer 2017, section 2.1). Two things tie the tokens of a batch together,
and both are defined over the whole batch, so that splitting it does not change the model:

capacity   an expert takes at most ceil(capacity_factor * k * tokens / E) tokens, first come, first
           served in the order of the batch; the others skip this layer (Lepikhin 2020). None: no
           token is ever dropped.
balance    aux_weight * E * sum over e of f_e * p_e: f_e the fraction of choices that fell on
           expert e, p_e the mean of its probability (Fedus 2021, equation 4). It is 1 * aux_weight
           when all is even, and it is added to the loss.

Shape letters as in gpt.py; N tokens of all samples, E experts, R rows: kept choices by expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import is_fake

from pardemo.models.gpt import GPT, Block, FeedForward, GPTConfig

Carried = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class MoEConfig(GPTConfig):
    """Sizes of a MoEGPT; by default 4 experts in each of 2 layers, of which a token visits 2."""

    n_layer: int = 2
    n_embd: int = 64
    n_experts: int = 4
    top_k: int = 2
    capacity_factor: float | None = 1.25
    aux_weight: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top_k <= self.n_experts:
            raise ValueError(f"top_k={self.top_k} must lie between 1 and {self.n_experts} experts")


class Here:
    """Where the experts are: all in this process. Expert parallelism puts another in its place."""

    def meet(self, counts_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(choices per expert by tokens before these, choices per expert by the whole batch)."""
        return torch.zeros_like(counts_E), counts_E

    def run(
        self, experts: nn.ModuleDict, rows_RD: torch.Tensor, counts_E: torch.Tensor
    ) -> torch.Tensor:
        """Every row through its expert; rows lie in the order of experts, `counts_E` of each.

        Without data, where nothing is chosen, every expert takes as many rows.
        """
        if _without_data(counts_E):
            parts = rows_RD.tensor_split(len(experts))
        else:
            parts = rows_RD.split(counts_E.tolist())
        return torch.cat(
            [expert(part) for expert, part in zip(experts.values(), parts, strict=True)]
        )


class MoE(nn.Module):
    """A gate and its experts. After a forward pass `choices` (E,) counts the whole batch's choices.

    `dropped` is how many choices of this process's tokens found their expert full. `exchange`
    says where the experts are.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.n_experts, bias=False)
        self.experts = nn.ModuleDict({str(e): FeedForward(config) for e in range(config.n_experts)})
        self.top_k, self.capacity_factor = config.top_k, config.capacity_factor
        self.aux_weight = config.aux_weight
        self.exchange: Any = Here()
        self.choices: torch.Tensor | None = None
        self.dropped = 0

    @property
    def imbalance(self) -> float:
        """Choices of the busiest expert over the mean: 1.0 is even, E is all on one."""
        if self.choices is None:
            raise RuntimeError("no imbalance yet: run a batch through the model first")
        return float(self.choices.max() / self.choices.float().mean())

    def forward(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, D) -> (B, T, D) and the balance loss (0-d)."""
        x_ND = x_BTD.flatten(0, -2)
        share_NE = F.softmax(self.gate(x_ND), dim=-1)
        weight_Nk, expert_Nk = share_NE.topk(self.top_k, dim=-1)
        if self.top_k > 1:  # with one, dividing would leave the gate without a gradient
            weight_Nk = weight_Nk / weight_Nk.sum(dim=-1, keepdim=True)
        picked, weight = expert_Nk.flatten(), weight_Nk.flatten()
        counts_E = _counts(picked, self.gate.out_features)
        before_E, total_E = self.exchange.meet(counts_E)
        kept = self._keep(picked, before_E, total_E)
        rows = kept[picked[kept].argsort(stable=True)]  # choices by expert, then by token
        taken_E = _counts(picked[rows], len(counts_E))
        out_RD = self.exchange.run(self.experts, x_ND[rows // self.top_k], taken_E)
        y_ND = torch.zeros_like(x_ND).index_add(
            0, rows // self.top_k, (out_RD * weight[rows, None]).to(x_ND.dtype)
        )
        self.choices, self.dropped = total_E, len(picked) - len(rows)
        even = (total_E / total_E.sum() * share_NE.mean(dim=0)).sum() * len(counts_E)
        return y_ND.view_as(x_BTD), self.aux_weight * even

    def _keep(
        self, picked: torch.Tensor, before_E: torch.Tensor, total_E: torch.Tensor
    ) -> torch.Tensor:
        """Indices of the choices that find a place: at most `capacity` per expert, in order.

        Without data all of them: nobody knows which expert would be full.
        """
        if self.capacity_factor is None or _without_data(picked):
            return torch.arange(len(picked), device=picked.device)
        capacity = math.ceil(self.capacity_factor * int(total_E.sum()) / len(total_E))
        mine = F.one_hot(picked, len(total_E)).cumsum(dim=0)
        place = mine.gather(1, picked[:, None]).squeeze(1) + before_E[picked]  # counted from 1
        return (place <= capacity).nonzero().squeeze(1)


def _without_data(tensor: torch.Tensor) -> bool:
    """Whether it has a shape and no values: on the meta device, or a fake tensor."""
    return tensor.is_meta or is_fake(tensor)


def _counts(picked: torch.Tensor, experts: int) -> torch.Tensor:
    """How often each expert is picked (E,); unlike bincount it has a shape on the meta device."""
    return picked.new_zeros(experts).scatter_add(0, picked, torch.ones_like(picked))


class MoEBlock(Block):
    """A transformer block with experts; it hands on the sum of the balance losses beside x."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        self.mlp = MoE(config)

    def forward(self, carried: Carried) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """x, or (x, loss so far) -> (x, loss so far)."""
        x_BTD, aux = carried if isinstance(carried, tuple) else (carried, None)
        x_BTD = x_BTD + self.attn(self.norm1(x_BTD))
        y_BTD, own = self.mlp(self.norm2(x_BTD))
        return x_BTD + y_BTD, own if aux is None else aux + own


class _Norm(nn.LayerNorm):
    def forward(self, carried: Any) -> Any:
        return super().forward(carried[0]), carried[1]


class _Head(nn.Linear):
    def forward(self, carried: Any) -> Any:
        return super().forward(carried[0]), carried[1]


class MoEGPT(GPT):
    """A GPT with experts: forward gives (logits, balance loss); `moe_loss` adds them up."""

    def __init__(self, config: MoEConfig | None = None) -> None:
        config = config or MoEConfig()
        super().__init__(config)
        self.norm = _Norm(config.n_embd, bias=config.bias)
        self.head = _Head(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.tok.weight
        else:
            nn.init.normal_(self.head.weight, std=0.02)

    def make_block(self, config: GPTConfig) -> nn.Module:
        """A block with experts."""
        assert isinstance(config, MoEConfig)
        return MoEBlock(config)


def layers(model: nn.Module) -> list[MoE]:
    """The mixture-of-experts layers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def moe_loss(output: tuple[torch.Tensor, torch.Tensor], targets_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy per token (nats) plus the balance loss."""
    logits_BTV, aux = output
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten()) + aux
