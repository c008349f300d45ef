"""Cutting a model into consecutive parts: the pieces, their costs, and the balanced cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _NormBase


class StrategyError(ValueError):
    """A strategy was asked for something it cannot do; the message says what to change."""


def pieces(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The ordered (name, module) pieces whose composition is `model`'s forward.

    A model says them itself through `sequence()`; an nn.Sequential is its children. Names are
    prefixes of the model's state_dict keys. Any other model raises StrategyError.
    """
    if hasattr(model, "sequence"):
        return list(model.sequence())  # type: ignore[operator]
    if isinstance(model, nn.Sequential):
        # not named_children(), which leaves out a module that occurs a second time
        return [(name, module) for name, module in model._modules.items() if module is not None]
    raise StrategyError(
        f"{type(model).__name__} cannot be cut into stages: only the model knows the order of its "
        "parts. Give it a method `sequence()` that returns [(name, module), ...] whose composition "
        "is forward, or make it an nn.Sequential."
    )


def check_pieces(model: nn.Module, parts: Sequence[tuple[str, nn.Module]]) -> None:
    """Raise StrategyError when a parameter of `model` is in none of its pieces."""
    inside = {id(p) for _, module in parts for p in module.parameters()}
    lost = [name for name, p in model.named_parameters() if id(p) not in inside]
    if lost:
        raise StrategyError(
            f"{', '.join(lost)} belong{'s' if len(lost) == 1 else ''} to no piece of "
            f"{type(model).__name__}.sequence(): a stage could not train it"
        )


def inseparable(parts: Sequence[tuple[str, nn.Module]]) -> list[list[int]]:
    """Numbers of the pieces, grouped so that no cut between groups splits shared statistics.

    A normalisation layer that two pieces share updates its running statistics at every use; copies
    of it on two ranks would drift apart, so everything between its first and last use stays whole.
    """
    seen = [
        [m for m in module.modules() if isinstance(m, _NormBase) and m.track_running_stats]
        for _, module in parts
    ]
    last = {layer: number for number, layers in enumerate(seen) for layer in layers}
    groups: list[list[int]] = []
    end = -1
    for number, layers in enumerate(seen):
        if number > end:
            groups.append([])
        groups[-1].append(number)
        end = max([end, number, *(last[layer] for layer in layers)])
    return groups


def parameter_costs(parts: Sequence[tuple[str, nn.Module]]) -> list[int]:
    """Elements of parameters per piece: the cost when nothing better was measured."""
    return [sum(p.numel() for p in module.parameters()) for _, module in parts]


def cut(costs: Sequence[float], parts: int) -> list[range]:
    """Cut `costs` into `parts` consecutive non-empty ranges whose largest sum is smallest.

    Exact, by dynamic programming over prefixes; of equal cuts the earliest is taken, so that every
    rank finds the same one. Raises StrategyError for more parts than pieces.
    """
    n = len(costs)
    if not 1 <= parts <= n:
        raise StrategyError(f"cannot cut {n} pieces into {parts} stages: use 1 to {n} stages")
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + float(cost))
    # best[k][j]: the smallest possible largest sum of the first j pieces in k + 1 parts
    best = [[total[j] for j in range(n + 1)]]
    where: list[list[int]] = [[0] * (n + 1)]
    for k in range(1, parts):
        row, back = [float("inf")] * (n + 1), [0] * (n + 1)
        for j in range(k + 1, n + 1):
            for i in range(k, j):
                worst = max(best[k - 1][i], total[j] - total[i])
                if worst < row[j]:
                    row[j], back[j] = worst, i
        best.append(row)
        where.append(back)
    ends = [n]
    for k in range(parts - 1, 0, -1):
        ends.append(where[k][ends[-1]])
    bounds = [0, *reversed(ends)]
    return [range(bounds[k], bounds[k + 1]) for k in range(parts)]


def cut_by_hand(names: Sequence[str], starts: Sequence[str], parts: int) -> list[range]:
    """Ranges of pieces for stages that begin at the named pieces (the first is implied).

    `starts` names the first piece of stage 1, 2, ...; unknown or unordered names, or a wrong
    number of them, raise StrategyError.
    """
    if len(starts) != parts - 1:
        raise StrategyError(
            f"{parts} stages need {parts - 1} names to start at, got {len(starts)}: {list(starts)}"
        )
    unknown = [name for name in starts if name not in names]
    if unknown:
        raise StrategyError(f"no piece is called {unknown[0]!r}; pieces are {', '.join(names)}")
    bounds = [0, *(list(names).index(name) for name in starts), len(names)]
    if sorted(set(bounds)) != bounds:
        raise StrategyError(f"stages must start in the model's order, got {list(starts)}")
    return [range(bounds[k], bounds[k + 1]) for k in range(parts)]


def entering(value: torch.Tensor) -> torch.Tensor:
    """What arrived from another part, as this part may use it: changed in place, if it wants to.

    What arrives asks for a gradient and was computed by nobody here; autograd refuses to let
    nn.ReLU(inplace=True) change such a tensor. The memory is the same.
    """
    return no_view(value) if value.is_leaf else value


def no_view(value: torch.Tensor) -> torch.Tensor:
    """The same storage, which autograd takes for a result of its own: no leaf and no view."""
    if not (torch.is_grad_enabled() and value.requires_grad):
        return value
    own: torch.Tensor = _NoView.apply(value)
    return own


class _NoView(torch.autograd.Function):
    """In place neither a leaf may be changed nor a view that another function made."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.new_empty(0).set_(value)  # type: ignore[call-overload]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]
