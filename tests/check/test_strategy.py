"""A strategy broken on purpose is caught, and the verdict says who drifted, when and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pardemo import check
from pardemo.launch import Ranks
from pardemo.strategies import StrategyError, base
from pardemo.workloads import workload


@dataclass
class Naive(base.Step):
    """Data parallelism by hand, with a switch for each thing that can be forgotten."""

    model: Any
    optimizer: Any
    loss: Any
    place: base.Axis
    synchronise: bool = True
    mean: bool = True
    weigh: bool = True
    late: int | None = None  # from this step on, rank 1 is left out
    steps: int = 0

    def step(self, batch: Any) -> torch.Tensor:
        (inputs, targets), weight = base.take_shard(batch, self.place.rank, self.place.size)
        weight = weight if self.weigh else 1 / self.place.size
        self.optimizer.zero_grad()
        value = self.loss(self.model(inputs), targets) * weight
        value.backward()
        for p in self.model.parameters():
            if self.synchronise:
                dist.all_reduce(p.grad)  # moves 2(n-1)/n * bytes of the gradient
            if not self.mean:
                p.grad *= self.place.size
        self.steps += 1
        if not (self.late is not None and self.steps > self.late and self.place.rank == 1):
            self.optimizer.step()
        return base.reduce_sum(value, self.place.group)


def naive(model: Any, make_optimizer: Any, loss: Any, mesh: Any, **knobs: Any) -> Naive:
    place = base.axis(mesh, "dp")
    if knobs.pop("broadcast", True):
        base.broadcast_module(model, place.group)
    return Naive(model, make_optimizer(model.parameters()), loss, place, **knobs)


def verdict(ranks: Ranks, batch_size: Any = 8, **knobs: Any) -> check.Verdict:
    return check.strategy(naive, "mlp", 2, batch_size=batch_size, ranks=ranks, **knobs)


def test_data_parallelism_by_hand_passes(ranks2: Ranks) -> None:
    said = verdict(ranks2, [8, 7, 8])
    assert said, said
    assert "after each of 3 steps" in repr(said)


def test_without_the_broadcast_the_rank_with_another_seed_is_blamed(ranks2: Ranks) -> None:
    said = verdict(ranks2, broadcast=False)
    assert not said
    assert "at step 0" in repr(said)


def test_without_synchronisation_every_rank_drifts_at_the_first_step(ranks2: Ranks) -> None:
    said = repr(verdict(ranks2, synchronise=False))
    assert "every rank drifted" in said
    assert "at step 0" in said


def test_a_sum_in_place_of_the_mean_is_caught(ranks2: Ranks) -> None:
    assert not verdict(ranks2, mean=False)


def test_parts_weighted_alike_are_caught_only_by_the_odd_batch(ranks2: Ranks) -> None:
    assert verdict(ranks2, weigh=False)
    said = verdict(ranks2, [8, 8, 7], weigh=False)
    assert not said
    assert "at step 2" in repr(said)


def test_a_rank_that_falls_behind_later_is_named_with_its_step(ranks2: Ranks) -> None:
    said = repr(verdict(ranks2, late=2))
    assert said.startswith("not yet: rank 1 of 2 drifted")
    assert "at step 2" in said


def test_a_strategy_that_does_not_fit_says_why_before_anything_is_launched() -> None:
    with pytest.raises(StrategyError, match="ddp does not fit mlp: a batch of 3 leaves"):
        check.strategy("ddp", "mlp", 4, batch_size=3)


def test_float32_is_checked_with_its_own_tolerance(ranks2: Ranks) -> None:
    said = check.strategy(naive, "mlp", 2, batch_size=8, dtype=torch.float32, ranks=ranks2)
    assert said
    assert "tolerance 1e-04" in repr(said)


def test_single_equals_itself_with_microbatches() -> None:
    said = check.strategy("single", workload("mlp"), 1, batch_size=[8, 7], accumulate=3)
    assert said, said
