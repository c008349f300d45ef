"""What each piece of a model costs, for cutting it into stages that take equally long."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn

from pardemo.strategies import base, pipeline_split

ROUNDS = 3  # of which the fastest counts


def costs(
    model: nn.Module, inputs: tuple[Any, ...], balance: str | Sequence[float]
) -> Sequence[float]:
    """One cost for each of the model's places: parameters, or seconds on `inputs`, or as given.

    Seconds are of forward and backward for a model that names its sequence, of forward alone for
    one that is traced (its backward takes about twice as long). Runs on a copy, so that neither
    buffers nor gradients change. Raises StrategyError when as many costs as places are not given.
    """
    places = pipeline_split.places(model)
    if balance == "parameters":
        return base.parameter_costs(places)
    if not isinstance(balance, str):
        if len(balance) != len(places):
            raise base.StrategyError(
                f"{len(balance)} costs for {len(places)} pieces: balance needs one for each of "
                f"{', '.join(name for name, _ in places)}"
            )
        return balance
    with torch.random.fork_rng():
        if pipeline_split.is_sequence(model):
            return _one_by_one(copy.deepcopy(model), inputs)
        return _inside(copy.deepcopy(model), [name for name, _ in places], inputs)


def _one_by_one(model: nn.Module, inputs: tuple[Any, ...]) -> list[float]:
    """Seconds of forward plus backward of every piece."""
    found, value = [], inputs[0] if len(inputs) == 1 else inputs
    for _, module in base.pieces(model):
        seconds = []
        for _ in range(ROUNDS):
            given = base.map_tensors(_fresh, value)
            start = _now(inputs[0])
            out = module(given)
            loss = sum(t.float().sum() for t in _tensors(out))
            if isinstance(loss, torch.Tensor) and loss.requires_grad:
                loss.backward()
            seconds.append(_now(inputs[0]) - start)
        value = base.map_tensors(lambda t: t.detach(), out)
        found.append(min(seconds))
    return found


def _inside(model: nn.Module, names: Sequence[str], inputs: tuple[Any, ...]) -> list[float]:
    """Seconds of every named part's forward, while the whole model runs."""
    began: dict[str, float] = {}
    took: dict[str, list[float]] = {name: [] for name in names}

    def note(name: str) -> None:
        def begin(*_: Any) -> None:
            began[name] = _now(inputs[0])

        def end(*_: Any) -> None:
            took[name][-1] += _now(inputs[0]) - began[name]

        part = model.get_submodule(name)
        part.register_forward_pre_hook(begin)
        part.register_forward_hook(end)

    for name in names:
        note(name)
    for _ in range(ROUNDS):
        for seconds in took.values():
            seconds.append(0.0)
        base.call(model, inputs)
    return [min(took[name]) for name in names]


def _now(where: torch.Tensor) -> float:
    """Seconds of a clock, read when this tensor's device has done all that it was asked."""
    if where.is_cuda:
        torch.cuda.synchronize(where.device)
    return time.perf_counter()


def _fresh(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _tensors(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    base.map_tensors(lambda t: found.append(t) or t, value)  # type: ignore[func-returns-value]
    return found
