"""Split nested state into tensors (for the checkpoint's files) and plain values (for its JSON)."""

from __future__ import annotations

from typing import Any

import torch

PLAIN = (bool, int, float, str, type(None))


def split(tree: Any, path: str = "") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Flat tensors and flat plain values of a nest of dicts, lists and tuples, by path.

    Raises TypeError, naming the path, for a value that is neither.
    """
    if isinstance(tree, torch.Tensor):
        return {path: tree}, {}
    if isinstance(tree, PLAIN):
        return {}, {path: tree}
    if not isinstance(tree, (dict, list, tuple)):
        raise TypeError(
            f"{path} is a {type(tree).__name__}: a checkpoint holds tensors, numbers and text"
        )
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for key, item in _items(tree):
        below = split(item, f"{path}/{key}" if path else str(key))
        tensors |= below[0]
        values |= below[1]
    return tensors, values


def fill(
    tree: Any, tensors: dict[str, torch.Tensor], values: dict[str, Any], path: str = ""
) -> Any:
    """The same nest as `tree`, with its leaves taken from `tensors` and `values` by path.

    A value that is in neither keeps what `tree` has.
    """
    if isinstance(tree, torch.Tensor):
        return tensors.get(path, tree)
    if not isinstance(tree, (dict, list, tuple)):
        return values.get(path, tree)
    filled = {
        key: fill(item, tensors, values, f"{path}/{key}" if path else str(key))
        for key, item in _items(tree)
    }
    return filled if isinstance(tree, dict) else type(tree)(filled.values())


def _items(tree: Any) -> list[tuple[Any, Any]]:
    return list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree))
