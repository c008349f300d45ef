"""Units: the parts of a model that sharding gathers, and recomputation repeats, one at a time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from pardemo.strategies.base import map_tensors
from pardemo.strategies.cut import StrategyError, no_view

SMALLEST = 0.1  # share of the largest candidate below which a part joins the root

# Products of matrices are dear to repeat; everything between them is cheap.
DEAR = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
]


def find(model: nn.Module, names: Sequence[str] | None = None) -> list[tuple[str, nn.Module]]:
    """The (name, module) units of a model, in order; whatever they leave out is the root's.

    Candidates are the model's `sequence()`, else the elements of its outermost nn.ModuleList and
    nn.Sequential. One that shares a parameter with the rest of the model, or is under a tenth of
    the largest, joins the root. `names` overrides that; an unknown or unfit name is refused.
    """
    if names is not None:
        return [(name, _named(model, name)) for name in names]
    candidates: dict[nn.Module, str] = {}
    ordered: Any = getattr(model, "sequence", None)
    listed = ordered() if callable(ordered) else _elements(model)
    for name, module in listed:
        candidates.setdefault(module, name)
    free = [m for m in candidates if m is not model and not _shares(model, m, candidates)]
    sizes = {module: parameters(module) for module in free}
    least = SMALLEST * max(sizes.values(), default=0)
    return [(candidates[m], m) for m in free if sizes[m] and sizes[m] >= least]


def parameters(module: nn.Module) -> int:
    """Elements of a module's parameters; a tied one counts once."""
    return sum(p.numel() for p in module.parameters())


def root_parameters(model: nn.Module, names: Sequence[str] | None = None) -> int:
    """Elements that belong to no unit: P_root of the closed form."""
    inside = {p for _, unit in find(model, names) for p in unit.parameters()}
    return sum(p.numel() for p in model.parameters() if p not in inside)


def _named(model: nn.Module, name: str) -> nn.Module:
    found = dict(model.named_modules(remove_duplicate=False))
    if name not in found or not name:
        near = ", ".join(list(dict(_elements(model)))[:6]) or "none were found"
        raise StrategyError(f"the model has no module {name!r} to make a unit of; try: {near}")
    if isinstance(found[name], (nn.ModuleList, nn.ModuleDict)):
        raise StrategyError(f"{name!r} is a list without a forward: name its elements instead")
    if _shares(model, found[name], {}):
        raise StrategyError(
            f"{name!r} shares a parameter with another part of the model: leave it to the root"
        )
    return found[name]


def _elements(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Elements of the outermost lists, and of lists in lists; other modules are looked into."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and not isinstance(
            child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)
        ):
            yield path, child
        else:
            yield from _elements(child, f"{path}.")


def _shares(model: nn.Module, unit: nn.Module, others: dict[nn.Module, str]) -> bool:
    """Whether a parameter of `unit` is also used outside it, or a submodule in another unit."""
    inside, mine = set(unit.modules()), set(unit.parameters())
    for module in model.modules():
        if module not in inside and mine & set(module._parameters.values()):
            return True
    return any(inside & set(o.modules()) for o in others if o is not unit and o not in inside)


def take_no_views(unit: nn.Module) -> None:
    """FSDP hands a unit views of its inputs, which it could not change in place, as ReLU may."""

    def alone(value: torch.Tensor) -> torch.Tensor:
        return value if isinstance(value, DTensor) else no_view(value)

    def own(_: nn.Module, args: Any, named: Any) -> Any:
        return map_tensors(alone, args), map_tensors(alone, named)

    unit.register_forward_pre_hook(own, with_kwargs=True)


def recompute(units: Sequence[tuple[str, nn.Module]], mode: str) -> None:
    """Make every unit repeat its forward in backward instead of keeping its activations.

    "full" keeps only the unit's input; "selective" also keeps the products of matrices. The
    unit's own `forward` is replaced, so names in the state dict stay.
    """
    if mode not in ("full", "selective"):
        raise StrategyError(f'checkpoint is "full" or "selective", not {mode!r}')
    if not units:
        raise StrategyError("checkpoint found no part to repeat: name some with units=[...]")
    for _, unit in units:
        again = functools.partial(_contexts, unit, mode)
        unit.forward = functools.partial(  # type: ignore[method-assign]
            checkpoint, unit.forward, use_reentrant=False, context_fn=again
        )


def _contexts(unit: nn.Module, mode: str) -> tuple[Any, Any]:
    """What forward and the repeated forward run under."""
    first: Any = contextlib.nullcontext()
    second: Any = contextlib.nullcontext()
    if mode == "selective":
        first, second = create_selective_checkpoint_contexts(DEAR)
    return first, _same_buffers(unit, second)


@contextlib.contextmanager
def _same_buffers(unit: nn.Module, inner: Any) -> Iterator[None]:
    """Repeat the forward on copies of the buffers: batch norm must not count a batch twice."""
    kept = [(module, dict(module._buffers)) for module in unit.modules() if module._buffers]
    for module, buffers in kept:
        for name, value in buffers.items():
            module._buffers[name] = None if value is None else value.clone()
    try:
        with inner:
            yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)
