"""What wrappers add to plain layers, as calibrate() times it: the least that each can do.

DTensor and FSDP, each beside the same layers without it, and with collectives silenced: what is
left is their own work in Python.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pardemo.measure.inside import Case
from pardemo.measure.quiet import quiet
from pardemo.measure.rounds import Comparison

ROWS, WIDTH = 512, 128  # beside real work, whose data drives the dispatcher's out of the caches


def _linears(*shapes: tuple[int, int], bias: bool = True) -> nn.Sequential:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return nn.Sequential(*[nn.Linear(*shape, bias=bias) for shape in shapes]).to(device)


def _stepped(net: nn.Module) -> Callable[[], object]:
    x = torch.randn(ROWS, WIDTH, device=next(net.parameters()).device)
    return lambda: net(x).sum().backward()


def _silenced(step: Callable[[], object]) -> Callable[[], object]:
    """The step without its collectives; the first one is real, because set-up needs answers."""
    step()

    def silent() -> None:
        with quiet():
            step()

    return silent


PAIRS = 4


def pair(mesh: Any) -> Callable[[], object]:
    """One rank's part of PAIRS pairs of layers that are cut over `mesh`, as plain layers."""
    half = WIDTH // mesh.size()
    return _stepped(_linears(*[(WIDTH, half), (half, WIDTH)] * PAIRS))


def split_pair(mesh: Any) -> Callable[[], object]:
    """The same as DTensors: column and row parts, their all-reduces silenced."""
    return _silenced(_stepped(_split(mesh)))


def _split(mesh: Any, bias: bool = True) -> Any:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    ways = (ColwiseParallel, RowwiseParallel)
    net = _linears(*[(WIDTH, WIDTH)] * (2 * PAIRS), bias=bias)
    plan: Any = {str(i): ways[i % 2]() for i in range(2 * PAIRS)}
    return parallelize_module(net, mesh, plan)


class apart:
    """make() of PAIRS split pairs that have inputs of their own, their all-reduces silenced.

    `anew`: of sizes that were never seen, as experts get them. A DTensor works out how to carry out
    an operator for every new shape, and keeps what it found; for a layer with a bias it is more.
    """

    def __init__(self, anew: bool) -> None:
        self.anew = anew

    def __call__(self, mesh: Any) -> Callable[[], object]:
        net, rows = _split(mesh, bias=False), itertools.count(ROWS)
        device = next(net.parameters()).device

        def step() -> None:
            for i in range(PAIRS):
                size = next(rows) if self.anew else ROWS + i
                x = torch.ones(size, WIDTH, device=device)
                net[2 * i + 1](net[2 * i](x)).sum().backward()

        return _silenced(step)


UNITS = 2  # of a root without parameters of its own, as the blocks of a model are
FEW, MANY = 1, 4  # Linear layers in each, of two tensors


class units:
    """make() of forward and backward of UNITS units of `linears` layers, sharded (silenced) or not.

    Each unit is gathered twice and reduced once, as a block is.
    """

    def __init__(self, linears: int, sharded: bool) -> None:
        self.linears, self.sharded = linears, sharded

    def __call__(self, mesh: Any) -> Callable[[], object]:
        shapes = [(WIDTH, WIDTH)] * self.linears
        net = nn.Sequential(*[_linears(*shapes) for _ in range(UNITS)])
        if not self.sharded:
            return _stepped(net)
        from torch.distributed.fsdp import fully_shard

        for unit in net:
            fully_shard(unit, mesh=mesh)
        fully_shard(net, mesh=mesh)
        return _silenced(_stepped(net))


def cases(ranks: int) -> dict[str, Case]:
    """Every wrapper and the same layers without it, on `ranks` ranks."""
    made: dict[str, Callable[[Any], Callable[[], object]]] = {
        "pair plain": pair, "pair dtensor": split_pair,
        "pairs known": apart(False), "pairs anew": apart(True),
    }  # fmt: skip
    for count in (FEW, MANY):
        made[f"units of {count}"] = units(count, sharded=False)
        made[f"fsdp units of {count}"] = units(count, sharded=True)
    return {name: Case(make, ranks=ranks) for name, make in made.items()}


def constants(found: Comparison) -> dict[str, float]:
    """Seconds that wrappers add to a layer whatever its size, forward and backward.

    `dtensor_s` for one Linear whose weight is a DTensor, `dtensor_new_s` more where its input has a
    new shape (without a bias); `fsdp_s` for one FSDP unit, `fsdp_tensor_s` for each parameter
    tensor in it.
    """

    def more(name: str, plain: str) -> float:
        return found[name].median_s - found[plain].median_s

    few, many = (more(f"fsdp units of {n}", f"units of {n}") / UNITS for n in (FEW, MANY))
    tensor_s = max(0.0, many - few) / (2 * (MANY - FEW))
    return {
        "dtensor_s": max(0.0, more("pair dtensor", "pair plain")) / (2 * PAIRS),
        "dtensor_new_s": max(0.0, more("pairs anew", "pairs known")) / (2 * PAIRS),
        "fsdp_tensor_s": tensor_s,
        "fsdp_s": max(0.0, few - 2 * FEW * tensor_s),
    }
