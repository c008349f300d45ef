"""Stages of a model that does not name its sequence, cut by torch's tracer."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining import SplitPoint, pipeline

from pardemo.strategies import base
from pardemo.strategies.pipeline_split import places, ranges, shadows, use_masks_as_given


class Inside(nn.Module):
    """A model one level down, so that its own tensors have names that no operator has.

    torch's tracer loses a tensor of the outermost module that is called as an operator is: a
    buffer `mean` in a model that takes a mean.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> Any:
        """What the model returns."""
        return self.model(*args)


class Relay(nn.Module):
    """One stage of a traced model; values that only later stages need are handed through.

    torch's traced stages send a skip connection straight to every stage that uses it, take its
    gradient from one of them only, and cannot hand a second model input to a later stage. Handing
    values from neighbour to neighbour serves every schedule and leaves the sums to autograd.
    """

    def __init__(self, body: nn.Module, call: Any, takes: list[str], gives: list[Any]) -> None:
        super().__init__()
        self.body, self.takes = body, takes
        self.name, self.args = call.name, [_path(arg) for arg in call.args]
        self.gives = [_path(node) for node in gives]

    def forward(self, *args: torch.Tensor) -> Any:
        """Values by name in, the values still needed out (a lone value without its tuple)."""
        known: dict[str, Any] = dict(zip(self.takes, map(base.entering, args), strict=True))
        known[self.name] = self.body(*[_look_up(path, known) for path in self.args])
        out = [_handed(_look_up(path, known), path[0] in self.takes) for path in self.gives]
        return out[0] if len(out) == 1 else tuple(out)


def _handed(value: torch.Tensor, passing: bool) -> torch.Tensor:
    """A view gives a value that only passes by a place in autograd's graph of this stage."""
    return value.view_as(value) if passing else value.contiguous()


def _path(node: Any) -> tuple[Any, ...]:
    """Where a value is found: (its own name, the name of what returned it, indices into that)."""
    if not isinstance(node, torch.fx.Node):
        return (None, node)
    source: Any = node
    indices: list[Any] = []
    while source.op == "call_function":  # operator.getitem(source, index)
        source, index = source.args
        indices.insert(0, index)
    return (node.name, source.name, *indices)


def _look_up(path: tuple[Any, ...], known: dict[str, Any]) -> Any:
    name, source, *indices = path
    if name is None:
        return source  # a constant
    if name in known:
        return known[name]
    value = known[source]
    for index in indices:
        value = value[index]
    return value


def traced(
    model: nn.Module, stages: int, starts: Sequence[str] | None, inputs: tuple[Any, ...],
    costs: Sequence[float],
) -> list[nn.Module]:  # fmt: skip
    """All stages of a model without a sequence, cut by torch's tracer at the starts of layers.

    `inputs` is one microbatch; the stages serve this shape only. `costs` has one for each place.
    Parameters are `model`'s own, so that a tie survives the cut. Raises StrategyError when
    torch.export cannot follow the model.
    """
    parts = places(model)
    cost = dict(zip([name for name, _ in parts], costs, strict=True))
    calls = _calls(model, list(cost), inputs)
    parts = [part for part in parts if calls.get(part[0], 0) == 1]
    parts.sort(key=lambda part: list(calls).index(part[0]))
    wanted = [cost[name] for name, _ in parts]
    starts = [parts[span[0]][0] for span in ranges(parts, stages, starts, wanted)[1:]]
    spec = {f"model.{start}": SplitPoint.BEGINNING for start in starts}
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            use_masks_as_given(),
        ):
            warnings.simplefilter("ignore")  # torch's own deprecations inside the tracer
            whole = Inside(model)
            pipe = pipeline(whole, inputs, split_spec=spec)
            _share(pipe.split_gm, whole)
            return _relays(pipe.split_gm)
    except Exception as error:  # torch.export raises its own kinds; the reader needs the way out
        raise _cannot_follow(model, error) from error


def _cannot_follow(model: nn.Module, error: Exception) -> base.StrategyError:
    first = (str(error).splitlines() or [""])[0]
    return base.StrategyError(
        f"torch.export cannot follow {type(model).__name__}, so it cannot be cut into stages "
        f"({type(error).__name__}: {first}). Give it a method "
        "`sequence()` that returns [(name, module), ...] whose composition is forward."
    )


def _calls(model: nn.Module, names: list[str], inputs: tuple[Any, ...]) -> dict[str, int]:
    """How often every part runs in one forward, in the order of their first runs.

    Raises StrategyError where a forward looks at values, which a tracer does not have.
    """
    counts: dict[str, int] = {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # a tensor that is a plain attribute
    (shadow,) = shadows([model], mode)
    for name in names:

        def count(*_: Any, name: str = name) -> None:
            counts[name] = counts.get(name, 0) + 1

        shadow.get_submodule(name).register_forward_pre_hook(count)
    given = tuple(mode.from_tensor(t) for t in inputs)
    try:
        with mode, torch.no_grad(), use_masks_as_given():
            shadow(*given)
    except Exception as error:
        raise _cannot_follow(model, error) from error
    return counts


def _share(split: nn.Module, model: nn.Module) -> None:
    """Let the traced stages use `model`'s own tensors: the tracer copies those that are shared."""
    own = {**dict(model.named_parameters(remove_duplicate=False)),
           **dict(model.named_buffers(remove_duplicate=False))}  # fmt: skip
    for prefix, module in split.named_modules(remove_duplicate=False):
        inside = ".".join(part.split("@")[0] for part in prefix.split(".")[1:])
        for table in (module._parameters, module._buffers):
            for name in table:
                key = f"{inside}.{name}".lstrip(".")
                if key in own:
                    table[name] = own[key]  # type: ignore[assignment]


def _relays(split: Any) -> list[nn.Module]:
    """The stages of a split graph, each with what it takes and what it must hand on."""
    nodes = list(split.graph.nodes)
    calls = [node for node in nodes if node.op == "call_module"]
    ready, wanted = {}, {}  # name -> stage that has it; name -> last stage that uses it
    for node in nodes:
        if node.op == "placeholder":
            ready[node.name] = 0
        elif node.op == "call_module":
            ready[node.name] = calls.index(node)
        elif node.op == "call_function":  # getitem: part of what a stage returned
            ready[node.name] = ready[node.args[0].name]
    for stage, call in enumerate(calls):
        for node in call.all_input_nodes:
            wanted[node.name] = stage
    for node in nodes[-1].all_input_nodes:
        wanted[node.name] = len(calls) - 1
    takes = [node.name for node in nodes if node.op == "placeholder"]
    stages: list[nn.Module] = []
    for stage, call in enumerate(calls):
        gives = [n for n in nodes if ready.get(n.name, stage + 1) <= stage < wanted.get(n.name, -1)]
        if call is calls[-1]:
            gives = list(nodes[-1].all_input_nodes)
        body = split.get_submodule(call.target)
        for module in body.modules():
            for node in getattr(getattr(module, "graph", None), "nodes", ()):
                node.meta.clear()  # the tracer's pretend tensors, which cannot be copied
        stages.append(Relay(body, call, takes, gives))
        takes = [node.name for node in gives]
    return stages
