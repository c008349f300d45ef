"""FSDP and HSDP equal one process whatever their knobs, and send and keep what the formulas say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from pardemo import check
from pardemo.launch import Ranks
from pardemo.workloads import Workload, sgd, workload
from tests.strategies import unusual

ODD = [8, 8, 7]


@pytest.mark.parametrize(
    "work",
    [
        lambda: workload("mlp"),
        unusual.mini_gpt,
        unusual.frozen_gpt,
        lambda: workload("resnet-mini"),
        unusual.shared_resnet,
        unusual.shared_linear,
        unusual.plain_transformer,
        unusual.branching,
    ],
)
def test_fsdp_equals_one_process_after_every_step(
    ranks2: Ranks, work: Callable[[], Workload]
) -> None:
    said = check.strategy("fsdp", work(), 2, batch_size=ODD, ranks=ranks2)
    assert said, said


@pytest.mark.parametrize(
    "knobs",
    [
        {"reshard_after_forward": False},
        {"offload": True},
        {"prefetch": 1},
        {"prefetch": 9},
        {"accumulate": 3},
        {"checkpoint": "full"},
        {"checkpoint": "selective"},
        {"units": []},
        {"units": ["blocks.1"], "checkpoint": "full"},
    ],
)
def test_every_knob_leaves_the_result_alone(ranks2: Ranks, knobs: dict[str, Any]) -> None:
    said = check.strategy("fsdp", unusual.mini_gpt(), 2, batch_size=ODD, ranks=ranks2, **knobs)
    assert said, said


@pytest.mark.parametrize("name", ["fsdp", "hsdp"])
def test_four_ranks_with_parts_of_unequal_size_equal_one_process(ranks4: Ranks, name: str) -> None:
    for work in (unusual.mini_gpt(), workload("resnet-mini"), workload("moe-mini")):
        said = check.strategy(name, work, 4, batch_size=[8, 7, 5], ranks=ranks4)
        assert said, said


def test_three_ranks_pad_what_three_does_not_divide() -> None:
    with Ranks(3, timeout=120) as ranks:
        said = check.strategy("fsdp", unusual.mini_gpt(), 3, batch_size=ODD, ranks=ranks)
    assert said, said


@pytest.mark.parametrize("shape", [(2, 2), (4, 1), (1, 4)])
def test_hsdp_works_on_every_shape_of_mesh(ranks4: Ranks, shape: tuple[int, int]) -> None:
    said = check.strategy("hsdp", unusual.mini_gpt(), 4, shape=shape, batch_size=8, ranks=ranks4)
    assert said, said


@pytest.mark.parametrize("knobs", [{}, {"checkpoint": "full"}])
def test_recomputing_a_batch_norm_does_not_count_the_batch_twice(
    ranks2: Ranks, knobs: dict[str, Any]
) -> None:
    said = check.strategy("fsdp", "resnet-mini", 2, batch_size=8, ranks=ranks2, **knobs)
    assert said, said


def test_bfloat16_rounds_and_stays_within_five_hundredths(ranks2: Ranks) -> None:
    work = replace(unusual.mini_gpt(), make_optimizer=sgd)  # AdamW's first step is only a sign
    arguments: dict[str, Any] = {"dtype": torch.float32, "batch_size": 8, "ranks": ranks2}
    said = check.strategy("fsdp", work, 2, **arguments, tolerance=0.05, mixed_precision="bf16")
    assert said, said
    exact = check.strategy("fsdp", work, 2, **arguments, mixed_precision="bf16")
    assert not exact, "bfloat16 cannot be exact: the knob did nothing"


def losses(mixed_precision: str | None) -> list[float]:
    work = replace(workload("resnet-mini"), make_optimizer=sgd)
    step = unusual.trainer("fsdp", work, mixed_precision=mixed_precision)
    return [float(step.step(work.make_batch(8, i, 0))) for i in range(3)]


def test_bfloat16_leaves_the_statistics_of_batch_norm_in_float32(ranks2: Ranks) -> None:
    exact, rounded = ranks2(losses, None)[0], ranks2(losses, "bf16")[0]
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact
