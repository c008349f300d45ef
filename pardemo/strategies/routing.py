"""Where routed tokens meet their experts when a batch is split over ranks.

A mixture of experts (models with an `exchange` seam) couples all tokens of a batch: an expert's
capacity and the balance loss are counted over all of them. Ranks therefore tell each other how many
choices fell on every expert, E integers each, before they drop or send a token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn


class _AllToAll(torch.autograd.Function):
    """Send rows to ranks by `sent` rows each, receive `received`; backward sends gradients back."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, sent: list[int], received: list[int],
        group: dist.ProcessGroup,
    ) -> torch.Tensor:  # fmt: skip
        ctx.splits, ctx.group = (sent, received), group
        return _swap(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        sent, received = ctx.splits
        return _swap(grads[0], received, sent, ctx.group), None, None, None


def _swap(
    rows: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> torch.Tensor:
    out = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(  # moves the rows that go to other ranks
        out, rows.contiguous(), received, sent, group=group
    )
    return out


class CountTogether:
    """All experts on every rank, but counted over the whole batch: for data parallelism."""

    def __init__(self, group: dist.ProcessGroup, here: Any) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.here = here

    def meet(self, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(choices per expert on ranks before this one, on all ranks): the batch's order."""
        table = counts.new_empty((self.size, len(counts)))
        rows = list(table.unbind())
        dist.all_gather(rows, counts, group=self.group)  # moves (n-1)/n * n E integers
        table = torch.stack(rows)
        return table[: self.rank].sum(dim=0), table.sum(dim=0)

    def run(self, experts: nn.ModuleDict, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """As in one process."""
        return self.here.run(experts, rows, counts)


class CountPositions(CountTogether):
    """All experts on every rank, which holds some positions of every sample: for context parallel.

    `chunks[rank]` are the pieces of each sequence that a rank holds, in its order; `samples` is set
    before every forward. Positions of other ranks lie between this rank's own, so how many choices
    came before one differs from piece to piece. It is asked only where experts have a capacity.
    """

    def __init__(self, group: dist.ProcessGroup, here: Any, chunks: list[list[int]]) -> None:
        super().__init__(group, here)
        self.chunks, self.samples = chunks, 1

    def meet(self, counts: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """(to be indexed by this rank's choices: those that came before them, on all ranks)."""
        return _Earlier(self, len(counts)), super().meet(counts)[1]

    def earlier(self, picked: torch.Tensor, experts: int) -> torch.Tensor:
        """For each choice (N k,): those of its expert before its piece, without this rank's own."""
        pieces = self.samples * len(self.chunks[self.rank])
        piece = torch.arange(len(picked), device=picked.device) // (len(picked) // pieces)
        own = torch.bincount(piece * experts + picked, minlength=pieces * experts)
        rows = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(rows, own, group=self.group)  # moves (n-1)/n * n pieces E integers
        shape = (self.samples, -1, experts)
        order = torch.tensor([c for chunks in self.chunks for c in chunks], device=picked.device)
        everyone = torch.cat([row.view(shape) for row in rows], dim=1)[:, order.argsort()]
        before = _before(everyone.flatten(0, 1)).view(shape)[:, self.chunks[self.rank]]
        return (before.flatten(0, 1) - _before(own.view(-1, experts)))[piece, picked]


class _Earlier:
    """What MoE adds to the place of its choices, found when it asks with `[picked]`."""

    def __init__(self, exchange: CountPositions, experts: int) -> None:
        self.exchange, self.experts = exchange, experts

    def __getitem__(self, picked: torch.Tensor) -> torch.Tensor:
        return self.exchange.earlier(picked, self.experts)


def _before(counts: torch.Tensor) -> torch.Tensor:
    """Sums of the rows before each row."""
    return counts.cumsum(dim=0) - counts


class SendToExperts(CountTogether):
    """Each rank holds the experts `owned[rank]`; rows travel to them and back.

    After a forward pass `away_rows` counts the rows that this rank's tokens sent to other ranks,
    `guest_rows` those that came from others. Forward and backward together this rank sends
    2 (away_rows + guest_rows) rows: guests' results and gradients go back too.
    """

    def __init__(self, group: dist.ProcessGroup, here: Any, owned: list[range]) -> None:
        super().__init__(group, here)
        self.owned = owned
        self.away_rows = self.guest_rows = 0

    def run(self, experts: nn.ModuleDict, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Rows in the order of all experts -> their outputs in the same order."""
        mine = len(self.owned[self.rank])
        sizes = [len(owned) for owned in self.owned]
        asked = self.swap(counts, sizes, [mine] * self.size).view(self.size, mine)
        sent = [int(part.sum()) for part in counts.split(sizes)]
        received = asked.sum(dim=1).tolist()
        self.away_rows = sum(sent) - sent[self.rank]
        self.guest_rows = sum(received) - received[self.rank]
        arrived = self.swap(rows, sent, received)
        order = self._by_expert(asked)
        done = self.here.run(experts, arrived[order], asked.sum(dim=0))
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return self.swap(done[back], received, sent)

    def swap(self, rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        """`sent[rank]` rows to every rank, in order, `received[rank]` from each; gradients back."""
        return _AllToAll.apply(rows, sent, received, self.group)

    def _by_expert(self, asked: torch.Tensor) -> torch.Tensor:
        """Rows arrive by rank, then by expert; this order puts them by expert, then by rank."""
        expert = torch.arange(asked.shape[1], device=asked.device).repeat(self.size)
        return expert.repeat_interleave(asked.flatten()).argsort(stable=True)


def seams(model: nn.Module) -> list[Any]:
    """The mixture-of-experts layers: modules with `experts` and an `exchange` to replace."""
    return [m for m in model.modules() if hasattr(m, "exchange") and hasattr(m, "experts")]


def synchronise(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Make every mixture of experts count over the batch of all ranks; nothing at degree 1."""
    if group is not None:
        for layer in seams(model):
            layer.exchange = CountTogether(group, layer.exchange)
