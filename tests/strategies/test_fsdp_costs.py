"""FSDP clips by the whole norm, sends and keeps what the formulas say, saves and refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from pardemo import check, predict, strategies
from pardemo.launch import Ranks
from pardemo.measure import count
from pardemo.models import GPT, GPTConfig
from pardemo.strategies import StrategyError, fsdp, units
from pardemo.workloads import sgd, workload
from tests.strategies import unusual


class Scaled(nn.Module):
    """A scalar parameter, which fully_shard refuses, beside two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 33), nn.Tanh(), nn.Linear(33, 10))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) * self.scale


def train(make: Any, name: str, loss: Any, knobs: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    row = strategies.get(name)
    step = row.build(make(), sgd, loss, row.mesh(), **knobs)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        x, y = torch.randn(7, 64, generator=generator), torch.arange(7)
        step.step((x, y))
    return step.state()


@pytest.mark.parametrize("max_norm", [0.01, 100.0])
@pytest.mark.parametrize("name", ["fsdp", "hsdp", "zero1"])
def test_clipping_uses_the_norm_of_the_whole_gradient(
    ranks2: Ranks, name: str, max_norm: float
) -> None:
    knobs = {"clip_grad": max_norm}
    reference = train(Scaled, "single", F.cross_entropy, knobs)
    assert check.same(ranks2(train, Scaled, name, F.cross_entropy, knobs), reference, 1e-5)
    free = ranks2(train, Scaled, name, F.cross_entropy, {})
    assert bool(check.same(free, reference, 1e-5)) == (max_norm == 100.0)


def sent(name: str, knobs: dict[str, Any], config: GPTConfig) -> dict[str, float]:
    """Sent bytes per kind of collective in the second step (the first sets FSDP up)."""
    work = unusual.mini_gpt(config)
    step = unusual.trainer(name, work, **knobs)
    step.step(work.make_batch(16, 0, 0))
    traffic = count(lambda: step.step(work.make_batch(16, 1, 0)))
    return {kind: traffic.sent_bytes(kind=kind) for kind in {f.kind for f in traffic.flows}}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"reshard_after_forward": False},
        {"accumulate": 2},
        {"checkpoint": "full"},
        {"units": []},
    ],
)
def test_bytes_are_those_of_the_formula(ranks2: Ranks, knobs: dict[str, Any], tied: bool) -> None:
    config = GPTConfig(256, 16, n_layer=3, n_head=4, n_embd=32, tied=tied)
    model = GPT(config)
    expected = predict.sent_bytes(
        "fsdp", ranks=2, parameters=units.parameters(model),
        root=units.root_parameters(model, knobs.get("units")),
        units=1 + len(fsdp.units(model, knobs.get("units"))), loss_bytes=4,
        microbatches=knobs.get("accumulate", 1), sync_every_microbatch=False,
        reshard_after_forward=knobs.get("reshard_after_forward", True), implementation="gloo",
    )  # fmt: skip
    for found in ranks2(sent, "fsdp", knobs, config):
        assert found == expected.by_kind()


def test_hsdp_reduces_a_shard_between_replicas(ranks4: Ranks) -> None:
    config = GPTConfig(256, 16, n_layer=3, n_head=4, n_embd=32)
    model = GPT(config)
    expected = predict.sent_bytes(
        "hsdp", shard=2, replicate=2, parameters=units.parameters(model),
        root=units.root_parameters(model), implementation="gloo",
    )  # fmt: skip
    kinds = expected.by_kind()
    kinds["all_reduce"] += 2 * 4  # the loss, on each axis
    for found in ranks4(sent, "hsdp", {}, config):
        assert found == kinds


def kept() -> tuple[int, int, int]:
    """Bytes of parameters, gradients and optimiser state on this rank after a step."""
    work = workload("gpt-mini", batch_size=4)
    step = unusual.trainer("fsdp", work)
    step.step(work.make_batch(4, 0, 0))
    tensors = [p.to_local() for p in step.model.parameters()]
    grads = [p.grad.to_local() for p in step.model.parameters()]
    moments = [v.to_local() for s in step.optimizer.state.values() for v in s.values() if v.ndim]
    return tuple(sum(t.numel() * 4 for t in found) for found in (tensors, grads, moments))


def test_every_rank_keeps_one_nth_of_everything(ranks2: Ranks, ranks4: Ranks) -> None:
    whole = 4 * units.parameters(workload("gpt-mini").make_model(0))
    for n, ranks in ((2, ranks2), (4, ranks4)):
        assert list(ranks(kept)) == [(whole // n, whole // n, 2 * whole // n)] * n


def test_units_are_the_blocks_and_the_root_keeps_what_is_tied_or_small() -> None:
    tied, untied = GPT(), GPT(GPTConfig(tied=False))
    blocks = [f"blocks.{i}" for i in range(4)]
    assert [name for name, _ in fsdp.units(tied)] == blocks
    assert [name for name, _ in fsdp.units(untied)] == ["embed", *blocks, "head"]
    assert units.root_parameters(tied) == (256 + 64) * 128 + 128
    assert units.root_parameters(untied) == 128
    plain = unusual.Plain()
    names = [name for name, _ in fsdp.units(plain)]
    assert names == ["core.encoder.layers.0", "core.decoder.layers.0"]


def test_a_part_that_shares_a_parameter_is_never_a_unit() -> None:
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    shared[2].weight = shared[0].weight
    assert [name for name, _ in fsdp.units(shared)] == ["1"]
    with pytest.raises(StrategyError, match="'0' shares a parameter"):
        fsdp.units(shared, ["0"])


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"units": ["block.9"]}, "no module 'block.9' to make a unit of; try: layers.0"),
        ({"units": ["layers"]}, "is a list without a forward"),
        ({"checkpoint": "some"}, '"full" or "selective", not \'some\''),
        ({"checkpoint": "full", "units": []}, "found no part to repeat"),
        ({"mixed_precision": "fp8"}, "\"bf16\", not 'fp8'"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_names(knobs: dict[str, Any], message: str) -> None:
    work = workload("mlp")
    with pytest.raises(StrategyError, match=message):
        fsdp.build(work.make_model(0), work.make_optimizer, work.loss, None, **knobs)


def saved_and_loaded(name: str) -> tuple[Any, Any]:
    work, row = unusual.mini_gpt(), strategies.get(name)

    def make(seed: int) -> Any:
        return row.build(work.make_model(seed), sgd_plain, work.loss, row.mesh())

    first, second = make(0), make(1)
    first.step(work.make_batch(8, 0, 0))
    second.load(first.state())
    for step in (first, second):
        step.step(work.make_batch(8, 1, 0))
    return first.state(), second.state()


def sgd_plain(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize("name", ["fsdp", "hsdp", "zero1", "context"])
def test_loading_a_full_state_continues_as_if_nothing_had_happened(
    ranks2: Ranks, name: str
) -> None:
    for first, second in ranks2(saved_and_loaded, name):
        assert check.same(second, first, 0.0)


def test_a_state_dict_with_other_keys_is_refused() -> None:
    work = workload("mlp")
    step = fsdp.build(work.make_model(0), work.make_optimizer, work.loss, None)
    state = step.state()
    state["extra"] = state.pop("layers.0.linear.bias")
    with pytest.raises(StrategyError, match="2 keys of the state dict differ"):
        step.load(state)


@pytest.mark.parametrize("name", ["fsdp", "hsdp", "zero1", "context", "expert"])
def test_at_degree_one_it_is_training_in_one_process(name: str) -> None:
    work = workload("moe-mini", batch_size=4) if name == "expert" else unusual.mini_gpt()
    step = strategies.get(name).build(work.make_model(0), work.make_optimizer, work.loss, None)
    single = strategies.get("single")
    reference = single.build(work.make_model(0), work.make_optimizer, work.loss, None)
    for i in range(2):
        assert step.step(work.make_batch(4, i, 0)) == reference.step(work.make_batch(4, i, 0))
    assert check.same(step.state(), reference.state(), 0.0)
