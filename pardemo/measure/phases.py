"""Which part of a training step is running: forward, backward or the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook as after_every_step
from torch.optim.optimizer import register_optimizer_step_pre_hook as before_every_step

Phase = Literal["forward", "backward", "optimizer"]
Hook = Callable[[torch.optim.Optimizer], None]


class PhaseWatch:
    """`now()` while it is open: "backward" while autograd runs a graph, "optimizer" inside
    Optimizer.step (any optimizer), else "forward".

    `before` and `after` are called with the optimizer around each of its steps.
    """

    def __init__(self, before: Hook | None = None, after: Hook | None = None) -> None:
        self._depth = 0
        self._before, self._after = before, after
        self._hooks: list[Any] = []

    def open(self) -> None:
        """Begin to watch the optimizers."""
        self._hooks = [before_every_step(self._enter), after_every_step(self._leave)]

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def now(self) -> Phase:
        """The phase of this moment, in this thread."""
        if self._depth:
            return "optimizer"
        if torch._C._current_graph_task_id() != -1:  # type: ignore[attr-defined]
            return "backward"
        return "forward"

    def _enter(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._depth += 1
        if self._before is not None:
            self._before(optimizer)

    def _leave(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._after is not None:
            self._after(optimizer)
        self._depth -= 1
