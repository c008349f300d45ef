"""Plain models that never mention ranks; `sequence()` names the pieces they may be cut into."""

from __future__ import annotations

import importlib
from typing import Any

import torch.nn as nn

from pardemo.models.gpt import GPT, GPTConfig
from pardemo.models.mlp import MLP
from pardemo.models.resnet import ResNet, ResNet18, ResNet50

__all__ = ["GPT", "MLP", "GPTConfig", "ResNet", "ResNet18", "ResNet50", "parameters"]


def parameters(model: nn.Module) -> int:
    """Elements of the model's parameters; a tied one counts once."""
    return sum(p.numel() for p in model.parameters())


def __getattr__(name: str) -> Any:
    if name in ("MoEGPT", "MoEConfig"):
        return getattr(importlib.import_module("pardemo.models.moe"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
