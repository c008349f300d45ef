"""Which Linear layers of a model may be split over ranks, found in the model itself.

A pair is one or more Linear layers split by columns (output features), then elementwise functions
only, then a Linear split by rows (input features): between them nothing needs to be sent.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F

from pardemo.strategies import tensor_attention
from pardemo.strategies.base import StrategyError

ELEMENTWISE_MODULES = (
    nn.ReLU, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Mish, nn.Softplus, nn.Hardswish,
    nn.Sigmoid, nn.Tanh, nn.Identity, nn.Dropout,
)  # fmt: skip
ELEMENTWISE_FUNCTIONS = (
    torch.relu, torch.tanh, torch.sigmoid, torch.mul, operator.mul, F.relu, F.gelu, F.silu,
    F.elu, F.leaky_relu, F.mish, F.softplus, F.dropout, F.tanh, F.sigmoid,
)  # fmt: skip
ELEMENTWISE_METHODS = ("relu", "tanh", "sigmoid", "mul", "contiguous")


@dataclass(frozen=True)
class Pair:
    """Names of Linear layers: `columns` are split by output features, `rows` by input features.

    All columns take the same input. `units` must be divisible by the ranks: heads of attention,
    else hidden features. `attention` names an nn.MultiheadAttention, whose columns are one weight.
    """

    columns: tuple[str, ...]
    rows: str
    units: int
    what: str
    attention: str = ""

    def refuse(self, ranks: int) -> str | None:
        """Why this pair cannot be split over so many ranks; None when it can."""
        if self.units % ranks == 0:
            return None
        name = self.attention or self.columns[0]
        return f"the {self.units} {self.what} of {name} do not divide by {ranks} ranks"


def pairs(model: nn.Module) -> list[Pair]:
    """All pairs of `model`, none of them overlapping, in the order of the model's modules."""
    shared = _shared(model)
    found: list[Pair] = []
    taken: set[str] = set()
    for pair in _find(model, ""):
        names = {*pair.columns, pair.rows, *([pair.attention] if pair.attention else [])}
        if names & taken or any(model.get_submodule(name) in shared for name in names):
            continue
        taken |= names
        found.append(pair)
    return found


def _shared(model: nn.Module) -> set[nn.Module]:
    """Modules that hold a parameter which also goes by another name, or run under two names."""
    owners: dict[int, list[nn.Module]] = {}
    names: dict[nn.Module, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        names[module] = names.get(module, 0) + 1
    for module in names:
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    tied = {m for modules in owners.values() if len(modules) > 1 for m in modules}
    return tied | {module for module, count in names.items() if count > 1}


def _find(module: nn.Module, prefix: str) -> Iterator[Pair]:
    if _is_attention(module):
        heads = module.wq.out_features // module.head_size  # type: ignore[union-attr,operator]
        columns = tuple(f"{prefix}{name}" for name in ("wq", "wk", "wv"))
        yield Pair(columns, f"{prefix}wo", int(heads), "heads")
        return
    if isinstance(module, nn.MultiheadAttention):
        if tensor_attention.splits(module):
            yield Pair((), f"{prefix}out_proj", module.num_heads, "heads", prefix[:-1])
        return
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        for name, child in module.named_children():
            if isinstance(child, nn.MultiheadAttention):
                yield from _find(child, f"{prefix}{name}.")
        columns, hidden = (f"{prefix}linear1",), module.linear1.out_features
        yield Pair(columns, f"{prefix}linear2", hidden, "hidden features")
        return
    graph = _trace(module)
    if graph is not None:
        yield from _chains(module, graph, prefix)
        return
    for name, child in module.named_children():
        yield from _find(child, f"{prefix}{name}.")


def _is_attention(module: nn.Module) -> bool:
    """Attention that counts its heads from what its query layer returns, as models.GPT does."""
    parts = [getattr(module, name, None) for name in ("wq", "wk", "wv", "wo")]
    return all(isinstance(part, nn.Linear) for part in parts) and hasattr(module, "head_size")


class _Tracer(torch.fx.Tracer):
    """Looks into every module but torch's own, and into no BatchNorm, whoever wrote it."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether `m` stays one node of the graph."""
        norm = isinstance(m, nn.modules.batchnorm._NormBase)
        return norm or super().is_leaf_module(m, module_qualified_name)


def _trace(module: nn.Module) -> torch.fx.Graph | None:
    """The module's graph; None when its Python cannot be followed or attention is inside."""
    if any(_is_attention(m) for m in module.modules()) or not list(module.children()):
        return None
    try:
        return _Tracer().trace(module)
    except Exception:  # any Python in forward may object to a proxy: then look at the parts
        return None


def _chains(module: nn.Module, graph: torch.fx.Graph, prefix: str) -> Iterator[Pair]:
    """Pairs in a graph: walk back from each Linear through elementwise functions to Linears."""
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    taken: set[Any] = set()
    for node in graph.nodes:
        if node.op == "call_module" and list(module.get_submodule(node.target).children()):
            yield from _find(module.get_submodule(node.target), f"{prefix}{node.target}.")
        if not _linear(module, node) or node.target in taken:
            continue
        columns = _columns(module, node.args[0])
        names = [str(column.target) for column in columns or ()]
        if not names or any(calls[n] > 1 or n in taken for n in [*names, node.target]):
            continue
        if len({column.args[0] for column in columns or ()}) > 1:
            continue
        taken |= {*names, node.target}
        hidden = int(module.get_submodule(names[0]).out_features)  # type: ignore[arg-type]
        columns_named = tuple(f"{prefix}{name}" for name in names)
        yield Pair(columns_named, f"{prefix}{node.target}", hidden, "hidden features")


def _linear(module: nn.Module, node: torch.fx.Node) -> bool:
    return node.op == "call_module" and type(module.get_submodule(str(node.target))) is nn.Linear


def _columns(module: nn.Module, node: object) -> list[torch.fx.Node] | None:
    """The Linears from which `node` is computed elementwise and by nobody else; None if others."""
    if not isinstance(node, torch.fx.Node) or len(node.users) != 1:
        return None
    if _linear(module, node):
        return [node]
    if node.op == "call_module":
        good = isinstance(module.get_submodule(str(node.target)), ELEMENTWISE_MODULES)
    elif node.op == "call_function":
        good = node.target in ELEMENTWISE_FUNCTIONS
    else:
        good = node.op == "call_method" and node.target in ELEMENTWISE_METHODS
    if not good:
        return None
    found: list[torch.fx.Node] = []
    for source in node.all_input_nodes:
        columns = _columns(module, source)
        if columns is None:
            return None
        found += [column for column in columns if column not in found]
    return found


def check(found: list[Pair], ranks: int, title: str) -> None:
    """Raise StrategyError when there is nothing to split, or something does not divide."""
    if not found:
        raise StrategyError(
            f"{title} has no Linear, elementwise, Linear to split over {ranks} ranks"
        )
    for pair in found:
        if reason := pair.refuse(ranks):
            raise StrategyError(f"{reason}: use a number of ranks that divides {pair.units}")
