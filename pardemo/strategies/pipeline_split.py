"""Cutting any model into pipeline stages: its own sequence of pieces, or torch's tracer.

A stage is a module that takes what the stage before it returned and returns what the stages after
it need: one tensor, or a tuple of tensors where a skip connection or a second input passes by.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pardemo.strategies import base


class Chain(nn.Module):
    """One stage: consecutive pieces of a model that names its own sequence."""

    def __init__(self, parts: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.names = [name for name, _ in parts]
        self.parts = nn.ModuleList(module for _, module in parts)

    def forward(self, *args: Any) -> Any:
        """The composition of the pieces; what crosses to the next stage is contiguous."""
        value: Any = base.map_tensors(base.entering, args[0] if len(args) == 1 else args)
        for part in self.parts:
            value = part(value)
        return base.map_tensors(lambda t: t.contiguous(), value)


def is_sequence(model: nn.Module) -> bool:
    """Whether `model` says itself in which order its pieces run."""
    return hasattr(model, "sequence") or isinstance(model, nn.Sequential)


def places(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The places where `model` may be cut: its sequence, else its layers in order of registration.

    For a model without a sequence these are the direct children, with lists of layers (and modules
    that hold such lists) opened; a module that is called twice is no place to cut.
    """
    return base.pieces(model) if is_sequence(model) else list(_layers(model, ""))


def _layers(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        lists = any(isinstance(m, nn.ModuleList) for m in child.modules())
        if lists or isinstance(child, nn.Sequential):
            yield from _layers(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def ranges(
    parts: Sequence[tuple[str, nn.Module]], stages: int, starts: Sequence[str] | None, costs: Any
) -> list[range]:
    """Which pieces make which stage: by the names where stages start, else balanced by `costs`."""
    names = [name for name, _ in parts]
    if starts is not None:
        return base.cut_by_hand(names, starts, stages)
    if stages > len(parts):
        raise base.StrategyError(
            f"{stages} stages but only {len(parts)} pieces to make them of ({', '.join(names)}): "
            f"use at most {len(parts)} stages (ranks x virtual stages)"
        )
    if costs is not None and len(costs) != len(parts):
        raise base.StrategyError(
            f"{len(costs)} costs for {len(parts)} pieces: balance needs one for each of "
            f"{', '.join(names)}"
        )
    return base.cut(base.parameter_costs(parts) if costs is None else costs, stages)


def chains(
    model: nn.Module, stages: int, starts: Sequence[str] | None, costs: Sequence[float] | None
) -> list[nn.Module]:
    """All stages of a model that names its own sequence."""
    parts = base.pieces(model)
    return [Chain([parts[i] for i in span]) for span in ranges(parts, stages, starts, costs)]


def _fresh(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())


@contextlib.contextmanager
def use_masks_as_given() -> Iterator[None]:
    """Keep torch's transformer layers from looking at a mask's values, to learn if it is causal.

    A run without data has no values. The mask is then used as it is, which gives the same result.
    """

    def told(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True

    with mock.patch.object(nn.modules.transformer, "_detect_is_causal_mask", told):
        yield


def shadows(modules: Sequence[nn.Module], mode: FakeTensorMode) -> list[nn.Module]:
    """Copies without data: running them in `mode` costs nothing and changes no buffer."""
    memo: dict[int, Any] = {}
    for module in modules:
        for tensor in [*module.parameters(), *module.buffers()]:
            memo[id(tensor)] = mode.from_tensor(tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, when a traced stage is copied
        return [copy.deepcopy(module, memo) for module in modules]


class Edges:
    """What crosses every boundary between stages, for any microbatch: shapes without values.

    Keeps a copy of all stages that has no data, so that no rank need ask another for its shapes.
    """

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.stages = shadows(stages, self.mode)

    def edges(self, inputs: tuple[Any, ...]) -> list[tuple[torch.Tensor, ...]]:
        """Tensors on "meta": the inputs, what each stage hands on, the output.

        Everything of floating point that crosses asks for a gradient, even from frozen stages:
        torch's split backward pass loses weight gradients of a stage whose input needs none.
        """
        found = [tuple(_empty(t) for t in inputs)]
        value = tuple(self.mode.from_tensor(t.detach()) for t in inputs)
        with self.mode, torch.no_grad(), use_masks_as_given():
            for number, stage in enumerate(self.stages):
                try:
                    out = stage(*value)
                except Exception as error:  # the tracer's own kinds; the reader needs the place
                    raise base.StrategyError(
                        f"stage {number} cannot be run without data, to learn the shapes that it "
                        f"hands on ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
                        ": what it computes depends on values"
                    ) from error
                value = out if isinstance(out, tuple) else (out,)
                found.append(tuple(_empty(t) for t in value))
        return [found[0], *(tuple(_fresh(t) for t in edge) for edge in found[1:])]


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="meta")
