"""BatchNorm over parts of unequal size is BatchNorm over the whole batch, forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

from pardemo.launch import Ranks
from pardemo.strategies import batchnorm

SHAPES = {1: (7, 3), 2: (7, 3, 4, 5), 3: (7, 3, 2, 2, 2)}
KINDS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def layer(dims: int, **options: object) -> nn.Module:
    torch.manual_seed(0)
    made = KINDS[dims](3, **options).double()
    if made.affine:
        nn.init.normal_(made.weight)
        nn.init.normal_(made.bias)
    return made


def data(dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = 50 + torch.randn(SHAPES[dims], generator=generator, dtype=torch.float64)
    return x, torch.randn(SHAPES[dims], generator=generator, dtype=torch.float64)


def run(module: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two training passes, gradients of the second, and one evaluation."""
    module(x)
    x = x.clone().requires_grad_()
    out = module(x)
    out.backward(grad)
    found = {"out": out, "x": x.grad, **dict(module.named_buffers())}
    found |= {name: p.grad for name, p in module.named_parameters()}
    module.eval()
    return {k: v.detach().clone() for k, v in found.items()} | {"eval": module(x).detach()}


def on_rank(dims: int, options: dict[str, object]) -> dict[str, torch.Tensor]:
    part = slice(0, 5) if dist.get_rank() == 0 else slice(5, 7)
    module = batchnorm.synchronise(layer(dims, **options), dist.group.WORLD, torch.device("cpu"))
    x, grad = data(dims)
    return run(module, x[part], grad[part])


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}]
)
def test_two_unequal_parts_give_what_the_whole_batch_gives(
    ranks2: Ranks, dims: int, options: dict[str, object]
) -> None:
    expected = run(layer(dims, **options), *data(dims))
    first, second = ranks2(on_rank, dims, options)
    for name, value in expected.items():
        if name == "eval" and "track_running_stats" in options:
            continue  # without running statistics each rank evaluates its own part
        if name in ("out", "x", "eval"):
            found = torch.cat([first[name], second[name]])
        elif name in ("weight", "bias"):
            found = first[name] + second[name]
        else:
            found = first[name]
            assert torch.equal(first[name], second[name])
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-9)


def test_conversion_keeps_keys_parameters_and_sharing() -> None:
    shared = nn.BatchNorm1d(4)
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), shared), "b": shared})
    before, weight = list(copy.deepcopy(model).state_dict()), shared.weight
    made = batchnorm.replace(model, batchnorm.GlobalBatchNorm)
    assert list(made.state_dict()) == before
    assert made["b"] is made["a"][1]
    assert made["b"].weight is weight


def test_a_large_mean_does_not_cancel_the_variance(ranks2: Ranks) -> None:
    def float32() -> torch.Tensor:
        torch.manual_seed(0)
        x = 3000 + torch.randn(64, 2)
        module = batchnorm.synchronise(nn.BatchNorm1d(2), dist.group.WORLD, torch.device("cpu"))
        return module(x.chunk(2)[dist.get_rank()])

    torch.manual_seed(0)
    expected = nn.BatchNorm1d(2)(3000 + torch.randn(64, 2))
    torch.testing.assert_close(torch.cat(list(ranks2(float32))), expected, rtol=0, atol=2e-3)


def test_without_batchnorm_or_ranks_nothing_is_touched() -> None:
    plain, normal = nn.Linear(2, 2), nn.BatchNorm1d(2)
    cpu = torch.device("cpu")
    assert batchnorm.synchronise(plain, None, cpu) is plain
    assert batchnorm.synchronise(normal, None, cpu) is normal
