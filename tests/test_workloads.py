"""Workloads learn, repeat themselves exactly, and take the reader's own model."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from pardemo import strategies
from pardemo.workloads import names, workload


@pytest.mark.parametrize("name", ["mlp", "resnet-mini", "gpt-mini"])
def test_losses_go_down(name: str) -> None:
    work = workload(name, batch_size=16)
    step = strategies.get("single").build(work.make_model(0), work.make_optimizer, work.loss, None)
    losses = [float(step.step(work.make_batch(16, i, 0))) for i in range(30)]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


@pytest.mark.parametrize("name", ["mlp", "resnet-mini", "resnet18", "gpt-mini"])
def test_models_and_batches_follow_from_their_arguments_alone(name: str) -> None:
    work = workload(name)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, batch = work.make_model(3), work.make_batch(4, 7, 5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = work.make_model(3), work.make_batch(4, 7, 5)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )
    assert torch.equal(batch[0], other[0])
    assert not torch.equal(batch[0], work.make_batch(4, 8, 5)[0])
    different = work.make_model(4)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(first.parameters(), different.parameters(), strict=True)
    )


def test_every_name_is_a_workload_or_says_what_is_missing() -> None:
    expected = {"mlp", "resnet18", "resnet50", "gpt-mini", "gpt-small", "gpt2", "moe-mini"}
    assert expected <= set(names())
    for name in ("resnet18", "gpt-small", "gpt2"):
        with torch.device("meta"):
            assert isinstance(workload(name).make_model(0), nn.Module)


def test_a_wrong_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'gpt-mini'"):
        workload("gpt-mimi")
    with pytest.raises(ValueError, match=r"package\.module:name"):
        workload("zzz")


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("my_package")
    monkeypatch.setitem(sys.modules, "my_package", module)
    return module


def test_ones_own_model_becomes_a_workload(mine: Any) -> None:
    def make() -> tuple[Any, ...]:
        batch = torch.randn(6, 5), torch.arange(6) % 3
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), F.cross_entropy, batch

    mine.make = make
    work = workload("my_package:make")
    assert work.batch_size == 6
    inputs, targets = work.make_batch(4, 0, 0)
    assert (inputs.shape, targets.shape) == ((4, 5), (4,))
    assert torch.equal(work.make_model(1)[0].weight, work.make_model(1)[0].weight)
    assert torch.equal(inputs, work.make_batch(4, 0, 0)[0])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (3, "must return .model, loss, batch., got int"),
        ((1, 2, 3), r"got \(int, int, int\)"),
        ((nn.Linear(1, 1), F.mse_loss, 3), r"batch must be \(inputs, targets\), got int"),
        ((nn.Embedding(3, 2, sparse=True), F.mse_loss, (1, 2)), "AdamW, refuses in one process"),
    ],
)
def test_what_a_callable_returns_wrongly_is_named(mine: Any, answer: Any, said: str) -> None:
    mine.make = lambda: answer
    with pytest.raises(ValueError, match=said):
        workload("my_package:make")
    with pytest.raises(ValueError, match="cannot be loaded"):
        workload("my_package:missing")


def _unlike(
    model: nn.Module, inputs: Any, loss: Any = F.mse_loss, count: int = 4
) -> tuple[Any, ...]:
    return model, loss, (inputs, torch.ones(count, 2))


class Named(nn.Linear):
    """Takes one dict."""

    def forward(self, parts: Any) -> torch.Tensor:
        return super().forward(parts["x"])


class Twice(nn.Linear):
    """Changes in place what autograd keeps."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).exp().mul_(2)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (_unlike(Twice(3, 2), torch.ones(4, 3)), "its loss has no gradient: .* inplace operation"),
        (_unlike(nn.Linear(7, 2), torch.ones(4, 3)), r"fail on 2 samples .* shapes cannot be mult"),
        (_unlike(nn.Linear(3, 2), torch.ones(4, 3), count=5), r"the shapes are \(4, 3\), \(5, 2\)"),
        (_unlike(nn.Linear(3, 2), torch.ones(0, 3), count=0), "at least one; the shapes are"),
        (_unlike(nn.Linear(3, 2), [[1.0]]), "tensors only, got float"),
        (
            _unlike(Named(3, 2), {"x": torch.ones(4, 3)}),
            r"'x' \(a dict is handed over as model\(\*\*",
        ),
        (
            _unlike(nn.Linear(3, 2), (torch.ones(4, 3),) * 2),
            r"\(a tuple is handed over as model\(\*",
        ),
        (_unlike(nn.Tanh(), torch.ones(4, 2)), "no parameter of its model is trained"),
        (_unlike(nn.Linear(3, 2), torch.ones(4, 3), lambda o, t: o - t), r"shape \(\) .*\(2, 2\)"),
        (_unlike(nn.Linear(3, 2), torch.ones(4, 3), lambda o, t: 0.5), "with a gradient, got 0.5"),
        (_unlike(nn.Linear(3, 2), torch.ones(4, 3) / 0), "first samples is (nan|inf), no number"),
    ],
)
def test_a_model_that_does_not_fit_its_own_batch_is_told_in_one_line(
    mine: Any, answer: Any, said: str
) -> None:
    mine.make = lambda: answer
    before = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=said) as caught:
        workload("my_package:make")
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_dict_for_one_argument_stands_in_a_tuple(mine: Any) -> None:
    mine.make = lambda: _unlike(Named(3, 2), ({"x": torch.ones(4, 3)},))
    work = workload("my_package:make")
    (inputs,), _ = work.make_batch(3, 0, 0)
    assert inputs["x"].shape == (3, 3)


def test_a_batchnorm_that_only_gpus_can_run_is_refused_without_one(
    mine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine.make = lambda: (nn.SyncBatchNorm(3), F.mse_loss, (torch.ones(4, 3), torch.ones(4, 3)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="SyncBatchNorm refuses CPU tensors: hand over"):
        workload("my_package:make")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert workload("my_package:make").batch_size == 4
