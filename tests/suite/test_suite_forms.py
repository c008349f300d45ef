"""The closed forms, fed with a model's own facts, against what every rank really sends."""

from __future__ import annotations

import pytest

from pardemo import strategies
from pardemo.launch import Ranks
from pardemo.suite import inside
from pardemo.suite.forms import FORMS, Scene, closed_form
from pardemo.workloads import workload

WORKLOADS = ("mlp", "resnet-mini", "gpt-mini")
BATCH = 8


def fits(name: str, work: str, ranks: int) -> bool:
    strategy = strategies.get(name)
    model = workload(work).make_model(0)
    return not strategy.reasons_against(model, ranks, BATCH)


CASES = [(name, work) for name in FORMS for work in WORKLOADS if fits(name, work, 2)]


@pytest.mark.parametrize(("name", "work"), CASES)
def test_every_rank_of_two_sends_exactly_what_the_formula_says(
    name: str, work: str, ranks2: Ranks
) -> None:
    _compare(name, work, ranks2, 2)


@pytest.mark.parametrize("name", ["ddp", "model_parallel", "pipeline", "fsdp", "hsdp", "tensor"])
def test_inner_ranks_of_four_do_too(name: str, ranks4: Ranks) -> None:
    _compare(name, "gpt-mini", ranks4, 4)


def _compare(name: str, work: str, ranks: Ranks, count: int) -> None:
    scene = Scene(workload(work), count, BATCH)
    if closed_form(name, scene, 0) is None:
        assert (name, work) == ("tensor", work) and work != "gpt-mini"  # noqa: PT018
        return
    seen = ranks(inside.look, inside.Maker(name, scene.work, BATCH), count)
    counted = [one.sent_bytes for one in seen]
    assert counted == pytest.approx(
        [closed_form(name, scene, rank).total for rank in range(count)], abs=0.01
    )


def test_one_rank_sends_nothing_and_an_unknown_strategy_has_no_form() -> None:
    assert closed_form("ddp", Scene(workload("mlp"), 1, BATCH), 0).total == 0
    assert closed_form("mine", Scene(workload("mlp"), 2, BATCH), 0) is None
