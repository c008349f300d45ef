"""Workloads: a model, a loss, batches and an optimiser under one name, the same on every rank."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map

from pardemo import data, models

Batch = tuple[Any, Any]


@dataclass(frozen=True)
class Workload:
    """What is trained: everything a strategy needs, and nothing about ranks.

    `make_model(seed)` and `make_batch(batch_size, step, seed)` depend on their arguments only.
    `loss(output, target)` is a mean over samples.
    """

    name: str
    make_model: Callable[[int], nn.Module]
    make_batch: Callable[[int, int, int], Batch]
    loss: Callable[[Any, Any], torch.Tensor]
    make_optimizer: Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]
    batch_size: int

    def __repr__(self) -> str:
        return f"workload {self.name!r}, {self.batch_size} samples per batch"


def names() -> list[str]:
    """The built-in workloads."""
    return list(_MAKERS)


def workload(name: str, batch_size: int | None = None) -> Workload:
    """The workload called `name`, or the user's own as "package.module:callable".

    The callable takes no arguments and returns (model, loss, batch): a module, a function
    loss(output, target) that is a mean over samples, and one batch (inputs, targets).
    """
    if ":" in name:
        found = _own(name)
    elif name in _MAKERS:
        found = _MAKERS[name]()
    else:
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"built in are {', '.join(names())}"
        raise ValueError(
            f"no workload is called {name[:80]!r}; {hint} (your own: 'package.module:name')"
        )
    return found if batch_size is None else replace(found, batch_size=batch_size)


def token_loss(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy per token (nats)."""
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def sgd(parameters: Iterable[torch.Tensor], lr: float = 0.05) -> torch.optim.Optimizer:
    """SGD with momentum 0.9."""
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def adamw(parameters: Iterable[torch.Tensor], lr: float = 1e-3) -> torch.optim.Optimizer:
    """AdamW with the usual betas."""
    return torch.optim.AdamW(parameters, lr=lr)


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a model from `seed` without disturbing the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _digits_batch(shape: tuple[int, ...], size: int, step: int, seed: int) -> Batch:
    pixels, labels = data.digits()
    chosen = data.draw(size, len(labels), step, seed)
    return pixels[chosen].view(size, *shape), labels[chosen]


def _image_batch(pixels: int, classes: int, size: int, step: int, seed: int) -> Batch:
    return data.images(size, pixels, classes=classes, seed=seed * 1_000_003 + step)


def _token_batch(length: int, size: int, step: int, seed: int) -> Batch:
    return data.windows(size, length, step, seed)


def _mlp() -> Workload:
    make_batch = partial(_digits_batch, (64,))
    return Workload("mlp", partial(_seeded, models.MLP), make_batch, F.cross_entropy, sgd, 64)


def _resnet_mini() -> Workload:
    from pardemo.models.resnet import Basic

    make = partial(models.ResNet, Basic, (1, 1, 1), 10, 1, width=8, small_images=True)
    make_batch = partial(_digits_batch, (1, 8, 8))
    return Workload("resnet-mini", partial(_seeded, make), make_batch, F.cross_entropy, sgd, 32)


def _resnet(name: str, make: Callable[..., nn.Module]) -> Workload:
    model = partial(_seeded, partial(make, 10, small_images=True))
    return Workload(name, model, partial(_image_batch, 32, 10), F.cross_entropy, sgd, 16)


def _gpt(name: str, config: models.GPTConfig, batch_size: int) -> Workload:
    model = partial(_seeded, partial(models.GPT, config))
    make_batch = partial(_token_batch, config.block_size)
    return Workload(name, model, make_batch, token_loss, adamw, batch_size)


def _moe_mini() -> Workload:
    moe = importlib.import_module("pardemo.models.moe")
    config = moe.MoEConfig()
    model = partial(_seeded, partial(moe.MoEGPT, config))
    return Workload("moe-mini", model, partial(_token_batch, 64), moe.moe_loss, adamw, 16)


_MAKERS: dict[str, Callable[[], Workload]] = {
    "mlp": _mlp,
    "resnet-mini": _resnet_mini,
    "resnet18": lambda: _resnet("resnet18", models.ResNet18),
    "resnet50": lambda: _resnet("resnet50", models.ResNet50),
    "gpt-mini": lambda: _gpt("gpt-mini", models.GPTConfig(), 16),
    "gpt-small": lambda: _gpt(
        "gpt-small", models.GPTConfig(256, 256, n_layer=6, n_head=6, n_embd=384), 8
    ),
    "gpt2": lambda: _gpt("gpt2", models.GPTConfig.gpt2(), 4),
    "moe-mini": _moe_mini,
}


def _own(name: str) -> Workload:
    """A workload from the user's callable; errors say which part of its answer is wrong."""
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name):
        raise ValueError(f"{name[:80]!r} is not package.module:name, a callable of yours")
    module_name, _, attribute = name.partition(":")
    try:
        make = getattr(importlib.import_module(module_name), attribute)
        answer = make()
    except (Exception, SystemExit) as error:  # whatever the user's module does
        raise ValueError(f"{name!r} cannot be loaded: {_first_line(error)}") from error
    if not (isinstance(answer, tuple) and len(answer) == 3):
        raise ValueError(f"{name} must return (model, loss, batch), got {type(answer).__name__}")
    model, loss, batch = answer
    if not isinstance(model, nn.Module) or not callable(loss):
        raise ValueError(
            f"{name} must return (nn.Module, callable, batch), got "
            f"({type(model).__name__}, {type(loss).__name__}, {type(batch).__name__})"
        )
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise ValueError(f"{name}: the batch must be (inputs, targets), got {type(batch).__name__}")
    sparse = [path for path, part in model.named_modules() if getattr(part, "sparse", False)]
    if sparse:
        raise ValueError(
            f"{name}: {sparse[0]} makes sparse gradients, which the optimiser here, AdamW, refuses "
            "in one process already: make it with sparse=False"
        )
    if not torch.cuda.is_available() and any(
        isinstance(m, nn.SyncBatchNorm) for m in model.modules()
    ):
        raise ValueError(
            f"{name}: nn.SyncBatchNorm refuses CPU tensors: hand over nn.BatchNorm, which every "
            "strategy that splits the batch makes look at all of it"
        )
    size = _samples(name, batch)
    with torch.random.fork_rng(devices=[]):
        _try_out(name, model, loss, _pick(batch, torch.arange(min(2, size))))
    return Workload(name, partial(_own_model, make), partial(_own_batch, make), loss, adamw, size)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _samples(name: str, batch: Any) -> int:
    """How many samples every tensor of the user's batch has; ValueError if they disagree."""
    found = tree_leaves(batch)
    wrong = [type(leaf).__name__ for leaf in found if not isinstance(leaf, torch.Tensor)]
    if wrong or not found:
        raise ValueError(f"{name}: a batch holds tensors only, got {(wrong or ['none'])[0]}")
    lengths = [leaf.shape[0] if leaf.ndim else None for leaf in found]
    if None in lengths or len(set(lengths)) > 1 or not lengths[0]:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in found)
        raise ValueError(
            f"{name}: dim 0 of every tensor of the batch counts its samples, at least one; "
            f"the shapes are {shapes}"
        )
    return lengths[0]


def _try_out(name: str, model: nn.Module, loss: Callable[[Any, Any], Any], few: Batch) -> None:
    """Run the user's model and loss once on a few samples; ValueError says what does not fit."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(f"{name}: no parameter of its model is trained (requires_grad)")
    inputs, targets = tree_map(lambda t: t.to(trained[0].device), few)
    how = ""
    try:
        if isinstance(inputs, dict):
            how = (
                " (a dict is handed over as model(**inputs): put it into a tuple to keep it whole)"
            )
            value = loss(model(**inputs), targets)
        elif isinstance(inputs, tuple):
            how = " (a tuple is handed over as model(*inputs))"
            value = loss(model(*inputs), targets)
        else:
            value = loss(model(inputs), targets)
    except Exception as error:
        raise ValueError(
            f"{name}: its model and loss fail on {len(tree_leaves(few)[0])} samples of its own "
            f"batch: {_first_line(error)}{how}"
        ) from error
    if not isinstance(value, torch.Tensor) or value.ndim or not value.requires_grad:
        got = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:80]
        raise ValueError(
            f"{name}: loss must return a tensor of shape () with a gradient, got {got}"
        )
    if not value.isfinite():
        raise ValueError(f"{name}: the loss of its first samples is {value.item()}, no number")
    try:
        torch.autograd.grad(value, trained, allow_unused=True)
    except RuntimeError as error:  # changed in place what autograd had kept
        raise ValueError(f"{name}: its loss has no gradient: {_first_line(error)}") from error


def _own_model(make: Callable[[], Any], seed: int) -> nn.Module:
    return _seeded(lambda: make()[0], seed)


def _own_batch(make: Callable[[], Any], size: int, step: int, seed: int) -> Batch:
    """`size` samples of the user's batch, in a seeded order that goes round and round."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inputs, targets = make()[2]
    chosen = data.draw(size, len(tree_leaves(inputs)[0]), step, seed)
    return _pick(inputs, chosen), _pick(targets, chosen)


def _pick(value: Any, chosen: torch.Tensor) -> Any:
    """The chosen samples of every tensor in a nested tuple, list or dict."""
    return tree_map(lambda tensor: tensor[chosen], value)
