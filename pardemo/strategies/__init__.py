"""Every strategy, by name. A new one is a file in this folder and a line in the table below."""

from __future__ import annotations

import difflib
import importlib
import importlib.util

import torch.nn as nn

from pardemo.strategies.base import Step, Strategy, StrategyError

__all__ = ["Step", "Strategy", "StrategyError", "get", "names", "reasons_against"]

# In the order they are taught; each module defines STRATEGY. Modules load when asked for.
MODULES = {
    "single": "single",
    "data_parallel": "data_parallel",
    "ddp": "ddp",
    "model_parallel": "model_parallel",
    "pipeline": "pipeline",
    "tensor": "tensor",
    "zero1": "zero1",
    "fsdp": "fsdp",
    "context": "context",
    "expert": "expert",
    "dp_tp": "dp_tp",
    "fsdp_tp": "fsdp_tp",
    "dp_pp": "dp_pp",
    "tp_pp": "tp_pp",
    "dp_pp_tp": "dp_pp_tp",
    "hsdp": "hsdp",
}


def names() -> list[str]:
    """Names of all strategies, in the order they are taught."""
    return [name for name, file in MODULES.items() if _exists(file)]


def get(name: str) -> Strategy:
    """The strategy called `name`; a wrong name raises StrategyError with the nearest right one."""
    if name not in MODULES or not _exists(MODULES[name]):
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"strategies are {', '.join(names())}"
        raise StrategyError(f"no strategy is called {name!r}; {hint}")
    return importlib.import_module(f"{__name__}.{MODULES[name]}").STRATEGY


def reasons_against(name: str, model: nn.Module, world_size: int, batch_size: int) -> list[str]:
    """Why `name` cannot train `model` on `world_size` devices; empty when it can."""
    return get(name).reasons_against(model, world_size, batch_size)


def _exists(file: str) -> bool:
    return importlib.util.find_spec(f"{__name__}.{file}") is not None
