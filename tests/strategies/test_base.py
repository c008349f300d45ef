"""Shards are weighted so that they add up, meshes factor evenly, names are found or suggested."""

from __future__ import annotations

import math

import pytest
import torch

from pardemo import strategies
from pardemo.strategies import Strategy, StrategyError, base


@pytest.mark.parametrize(("samples", "count"), [(8, 2), (7, 2), (7, 4), (5, 5)])
def test_weighted_means_of_the_shards_are_the_mean_of_the_batch(samples: int, count: int) -> None:
    batch = torch.rand(samples, 3, dtype=torch.float64)
    parts = [base.take_shard(batch, i, count) for i in range(count)]
    total = sum(part.mean() * weight for part, weight in parts)
    assert math.isclose(total, batch.mean(), rel_tol=1e-12)
    assert math.isclose(sum(weight for _, weight in parts), 1.0)


def test_nested_batches_are_split_alike() -> None:
    batch = {"a": torch.arange(5), "b": (torch.arange(5) * 2, "kept")}
    part, weight = base.take_shard(batch, 1, 2)
    assert part["a"].tolist() == [3, 4]
    assert part["b"][0].tolist() == [6, 8]
    assert part["b"][1] == "kept"
    assert weight == 0.4
    with pytest.raises(StrategyError, match="got str"):
        base.samples("no tensor")


def test_a_microbatch_too_many_is_refused_on_every_rank_alike() -> None:
    for rank in range(2):  # rank 0 has three samples, rank 1 two: both must say no to three
        with pytest.raises(StrategyError, match="leaves 2 samples on some rank"):
            base.microbatches(torch.arange(5), base.Axis(2, rank), 3)


@pytest.mark.parametrize(
    ("world", "axes", "expected"),
    [(4, 2, (2, 2)), (8, 2, (2, 4)), (8, 3, (2, 2, 2)), (6, 2, (2, 3)), (3, 2, (1, 3)),
     (1, 2, (1, 1)), (12, 2, (3, 4))],
)  # fmt: skip
def test_worlds_are_factored_evenly_with_the_larger_degree_inside(
    world: int, axes: int, expected: tuple[int, ...]
) -> None:
    assert base.factor(world, axes) == expected


def test_names_are_listed_in_the_order_of_teaching_and_near_misses_suggested() -> None:
    names = strategies.names()
    assert names[:4] == ["single", "data_parallel", "ddp", "model_parallel"]
    with pytest.raises(StrategyError, match="did you mean 'data_parallel'"):
        strategies.get("dataparallel")
    with pytest.raises(StrategyError, match="strategies are single, "):
        strategies.get("xyz")


@pytest.mark.parametrize("name", strategies.names())
def test_every_row_of_the_registry_is_complete(name: str) -> None:
    row = strategies.get(name)
    assert isinstance(row, Strategy)
    assert row.name == name
    assert row.title
    assert callable(row.build)
    shape = row.shape(4) if row.axes else ()
    assert math.prod(shape) == (4 if row.axes else 1)


def test_without_ranks_there_is_no_mesh_and_every_degree_is_one() -> None:
    row = strategies.get("ddp")
    assert row.mesh() is None
    assert base.axis(None, "dp") == base.Axis(1, 0, None)
    assert base.axis(None, "dp").ranks == [0]
