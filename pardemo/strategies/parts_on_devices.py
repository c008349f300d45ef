"""Consecutive parts of a model on several devices of one process."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from pardemo.strategies import base, parts


class Transfer(NamedTuple):
    """One crossing from part `source` to part `target`; `seconds` is None when not timed."""

    source: int
    target: int
    bytes: int
    seconds: float | None


def device_names(devices: int | Sequence[str], here: torch.device) -> list[torch.device]:
    """The devices by name; a number means that many GPUs, or that many times the CPU."""
    if not isinstance(devices, int):
        return [torch.device(name) for name in devices]
    if here.type != "cuda":
        return [here] * devices
    if devices > torch.cuda.device_count():
        raise base.StrategyError(
            f"devices={devices}, but this process sees {torch.cuda.device_count()} GPUs"
        )
    return [torch.device("cuda", index) for index in range(devices)]


class Placed(nn.Module):
    """Pieces in order, each on its device; what flows between two devices is copied and counted."""

    def __init__(
        self, cut: Sequence[Sequence[tuple[str, nn.Module]]], devices: Sequence[torch.device]
    ) -> None:
        super().__init__()
        self.devices = list(devices)
        self.order = [module for part in cut for _, module in part]
        self.part: dict[nn.Module, int] = {}
        for number, part in enumerate(cut):
            for _, module in part:
                self.part.setdefault(module, number)  # a piece used twice stays where it is first
        self.lend_tied()
        for module, number in self.part.items():
            module.to(self.devices[number])
        self.pieces = nn.ModuleList(self.part)
        self.transfers: list[Transfer] = []

    def lend_tied(self) -> None:
        """A parameter used on two devices lives on the first, and is lent to the other."""
        home: dict[nn.Parameter, tuple[nn.Module, str, int]] = {}
        for piece, number in self.part.items():
            for module in piece.modules():
                for name, parameter in list(module._parameters.items()):
                    if parameter is None:
                        continue
                    owner, attribute, at = home.setdefault(parameter, (module, name, number))
                    if self.devices[at] == self.devices[number]:
                        continue
                    if owner is module:
                        raise base.StrategyError(
                            f"{type(module).__name__} is inside pieces on {self.devices[at]} and "
                            f"on {self.devices[number]}: cut elsewhere, or make it a piece"
                        )
                    del module._parameters[name]
                    module.register_forward_pre_hook(self.lend(owner, attribute, at, name, number))

    def lend(self, owner: nn.Module, attribute: str, at: int, name: str, number: int) -> Any:
        """A hook that copies the owner's parameter to the borrower's device; autograd sees it."""

        def hook(module: nn.Module, args: Any) -> None:
            setattr(module, name, self.move(getattr(owner, attribute), at, number))

        return hook

    def forward(self, x: Any) -> Any:
        """The composition of the pieces; the result stays on the last device."""
        self.transfers, at = [], self.part[self.order[0]]
        x = base.to_device(x, self.devices[at])
        for piece in self.order:
            if self.part[piece] != at:
                x = self.move(x, at, self.part[piece])
                at = self.part[piece]
            x = piece(x)
        return x

    def move(self, value: Any, source: int, target: int) -> Any:
        """Copy to another part's device; counted also where both are the same CPU."""
        device, found = self.devices[target], []

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            found.append(tensor.numel() * tensor.element_size())
            return tensor.to(device)

        gpus = {d for d in (device, self.devices[source]) if d.type == "cuda"}
        _finish(gpus)  # else the copy's time would hold the computing before it
        start = time.perf_counter()
        value = base.map_tensors(copy, value)
        _finish(gpus)
        self.transfers.append(Transfer(source, target, sum(found), time.perf_counter() - start))
        return value


def _finish(gpus: Iterable[torch.device]) -> None:
    """Wait until these GPUs have done all that they were asked."""
    for gpu in gpus:
        torch.cuda.synchronize(gpu)


class OnDevices(base.Step):
    """One optimiser step; `transfers` are the crossings of the last one, forward and backward."""

    def __init__(
        self, model: nn.Module, cut: Sequence[Sequence[tuple[str, nn.Module]]],
        make_optimizer: base.MakeOptimizer, loss: base.Loss, devices: Sequence[torch.device],
        clip_grad: float | None,
    ) -> None:  # fmt: skip
        self.held = parts.slots(model)  # before tied parameters are lent
        self.placed = Placed(cut, devices)
        super().__init__(self.placed, make_optimizer(self.placed.parameters()))
        self.loss, self.clip_grad = loss, clip_grad
        self.transfers: list[Transfer] = []

    def step(self, batch: Any) -> torch.Tensor:
        """Forward through all devices, the loss on the last, backward the same way."""
        assert self.optimizer is not None
        inputs, targets = batch
        self.optimizer.zero_grad()
        output = self.placed(inputs)
        loss = self.loss(output, base.to_device(targets, self.placed.devices[-1]))
        loss.backward()  # moves each crossing's gradient back, as many bytes as its values
        forward = self.placed.transfers
        back = [Transfer(t.target, t.source, t.bytes, None) for t in reversed(forward)]
        self.transfers = forward + back
        base.clip_gradients(self.placed.parameters(), self.clip_grad)
        self.optimizer.step()
        return loss.detach()

    def state(self) -> base.State:
        """The whole model, under the original names."""
        return parts.read(self.held)

    def load(self, state: base.State) -> None:
        """Take a full state dict."""
        parts.write(self.held, state)
