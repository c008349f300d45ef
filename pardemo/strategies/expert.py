"""Expert parallelism: every rank keeps some of the experts, tokens travel to theirs.

Split      the batch, and of every mixture-of-experts layer its E experts: rank r keeps E/e of them,
           in order (sizes differ by at most one). Everything else is on all ranks.
Sent       per layer: the counts of choices (an all-gather of E integers per rank, an all-to-all of
           E), then the tokens in two all-to-alls forward, to the experts and back, and their
           gradients in two backward: with R rows of D elements routed by this rank, about
           4 (e-1)/e R D b bytes; exactly, 2 x the rows it routed to others and 2 x those that
           others routed to it. Once per step an all-reduce of the gradients of everything that
           is not an expert. Experts need none: they saw the tokens of all ranks.
Memory     1/e of the experts' parameters, gradients and optimiser state; the rest whole. The rows
           that arrive depend on the router: with an uneven one the busiest rank decides.
Paper      Lepikhin et al. 2020, "GShard"; Fedus et al. 2021, "Switch Transformers".

Capacity and balance loss are counted over the whole batch (see routing.py), which is what makes the
ranks train exactly what one process would.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh

from pardemo.strategies import base, parts, routing


class Expert(base.Step):
    """Train on this rank's part of the batch, with this rank's experts."""

    def __init__(
        self, model: nn.Module, make_optimizer: base.MakeOptimizer, loss: base.Loss,
        place: base.Axis, device: torch.device, keys: list[str], clip_grad: float | None,
    ) -> None:  # fmt: skip
        super().__init__(model, make_optimizer(model.parameters()))
        self.loss, self.place, self.device, self.clip_grad = loss, place, device, clip_grad
        self.keys = keys  # of the whole model's state dict
        owned = {p for layer in routing.seams(model) for p in layer.experts.parameters()}
        self.shared = [p for p in model.parameters() if p not in owned]

    def step(self, batch: Any) -> torch.Tensor:
        """Forward and backward move tokens; then the shared parameters' gradients are summed."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        part, weight = base.take_shard(batch, self.place.rank, self.place.size)
        inputs, targets = base.to_device(part, self.device)
        value = self.loss(base.call(self.model, inputs), targets) * weight
        value.backward()
        parts.add_gradients(self.shared, self.place.group)
        elsewhere = self.shared if self.place.rank else []  # their norm is counted once
        parts.clip(self.model.parameters(), self.clip_grad, self.place.group, elsewhere)
        self.optimizer.step()
        return base.reduce_sum(value, self.place.group)

    def state(self) -> base.State:
        """The shared tensors from here, every expert from its rank."""
        own = self.model.state_dict()
        state = base.to_cpu(own)
        if self.place.group is None:
            return state
        experts = {key: state[key] for key in self._expert_keys(own)}
        missing = [key for key in self.keys if key not in state or key in experts]
        state |= parts.gather(experts, self.place.group, missing)
        return {key: state[key] for key in self.keys}

    def load(self, state: base.State) -> None:
        """Every rank takes the shared tensors and its own experts; nothing is sent."""
        wrong = sorted(set(self.keys) ^ set(state))
        if wrong:
            raise base.StrategyError(f"{len(wrong)} keys of the state dict differ: {wrong[:4]}")
        self.model.load_state_dict({key: state[key] for key in self.model.state_dict()})

    def _expert_keys(self, own: dict[str, Any]) -> list[str]:
        paths = [
            f"{name}.experts."
            for name, module in self.model.named_modules()
            if any(module is layer for layer in routing.seams(self.model))
        ]
        return [key for key in own if key.startswith(tuple(paths))]


def share(experts: int, ranks: int) -> list[range]:
    """Which experts each rank keeps: consecutive, sizes differing by at most one."""
    sizes = [experts // ranks + (rank < experts % ranks) for rank in range(ranks)]
    return [range(sum(sizes[:rank]), sum(sizes[: rank + 1])) for rank in range(ranks)]


def reasons_against(model: nn.Module, world_size: int, batch_size: int) -> list[str]:
    """Why the experts cannot be spread: there are none, or fewer than ranks."""
    layers = routing.seams(model)
    if not layers:
        return ["it has no experts: no module has `experts` and an `exchange` to replace"]
    fewest = min(len(layer.experts) for layer in layers)
    few = [f"{fewest} experts are fewer than {world_size} ranks"] if fewest < world_size else []
    return few + base.too_few_samples(model, world_size, batch_size)


def build(
    model: nn.Module, make_optimizer: base.MakeOptimizer, loss: base.Loss,
    mesh: DeviceMesh | None = None, *, clip_grad: float | None = None,
) -> Expert:  # fmt: skip
    """Spread the experts of `model` and the batch over the axis "ep"."""
    place, device = base.axis(mesh, "ep"), base.this_device(mesh)
    model = model.to(device)
    keys = list(model.state_dict())
    if place.group is not None:
        against = reasons_against(model, place.size, place.size)
        if against:
            raise base.StrategyError(
                f"experts cannot be spread over {place.size} ranks: {against[0]}"
            )
        base.broadcast_module(model, place.group)
        for layer in routing.seams(model):
            owned = share(len(layer.experts), place.size)
            names = list(layer.experts)
            mine = {names[e]: layer.experts[names[e]] for e in owned[place.rank]}
            layer.experts = nn.ModuleDict(mine)
            layer.exchange = routing.SendToExperts(place.group, layer.exchange, owned)
    return Expert(model, make_optimizer, loss, place, device, keys, clip_grad)


STRATEGY = base.Strategy(
    name="expert",
    title="expert parallel",
    axes=("ep",),
    build=build,
    reasons_against=reasons_against,
    knobs={"clip_grad": "largest global gradient norm"},
    lesson="09_context_and_expert_parallelism",
)
