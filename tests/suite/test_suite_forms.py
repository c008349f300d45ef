"""Closed forms, fed with a model's own facts, against what every rank really sends and keeps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pardemo import strategies
from pardemo.launch import Ranks
from pardemo.suite import inside, weights
from pardemo.suite.forms import FORMS, closed_form
from pardemo.suite.ledger import compare
from pardemo.suite.scene import Scene
from pardemo.suite.weighed import Weighed
from pardemo.workloads import workload

WORKLOADS = ("mlp", "resnet-mini", "gpt-mini", "moe-mini")
BATCH = 8
EVERY = [name for name in strategies.names() if name not in ("single", "data_parallel")]
THREE_AXES = [name for name in EVERY if len(strategies.get(name).axes) == 3]
# what a model with experts cannot be cut into yet: its blocks hand on two values
NO_EXPERTS = ("model_parallel",)


def cases(ranks: int, works: tuple[str, ...]) -> list[tuple[str, str]]:
    """Every strategy that fits, none of whose axes has degree 1."""
    found = []
    for work in works:
        model = workload(work).make_model(0)
        for name in EVERY:
            row = strategies.get(name)
            if 1 in row.shape(ranks) or row.reasons_against(model, ranks, BATCH):
                continue
            if not (work == "moe-mini" and name in NO_EXPERTS):
                found.append((name, work))
    return found


@pytest.fixture(scope="module")
def ranks8() -> Iterator[Ranks]:
    with Ranks(8, timeout=240) as ranks:
        yield ranks


def hold(name: str, work: str, ranks: Ranks, count: int) -> None:
    """Every rank's bytes and memory beside their closed forms."""
    scene = Scene(workload(work), count, BATCH)
    seen = ranks(inside.look, inside.Maker(name, scene.work, BATCH), count)
    for rank, one in enumerate(seen):
        same_bytes(name, scene, rank, one)
        same_memory(name, scene, rank, one)


def same_bytes(name: str, scene: Scene, rank: int, seen: inside.Seen) -> None:
    formula = closed_form(name, scene, rank, seen.routed)
    found = compare(name, seen.traffic, formula, scene.degrees(name))
    assert found.entries
    assert found.formula_bytes is not None
    assert not found.unequal, repr(found)


def same_memory(name: str, scene: Scene, rank: int, seen: inside.Seen, **knobs: object) -> Weighed:
    """States to the byte; the peak, which holds passing values too, within a quarter."""
    ranks = 1 if name == "data_parallel" else scene.ranks
    said = weights.forecast(name, scene, rank, ranks, knobs)["memory_formula"]
    weighed = Weighed(name, seen.memory, said, seen.peak_at)
    assert weighed.states_equal, weighed.cells()
    assert seen.peak_at.split()[0] in ("forward", "backward", "optimizer")
    states = sum(seen.memory[f"{kind}_bytes"] for kind in ("parameters", "optimizer", "buffers"))
    assert seen.memory["peak_bytes"] > states
    assert weighed.peak_error is not None
    if scene.work.name in ("gpt-mini", "moe-mini"):
        assert abs(weighed.peak_error) < 0.25, weighed.cells()
    return weighed


def test_every_strategy_of_the_registry_has_a_closed_form() -> None:
    closed_form("ddp", Scene(workload("mlp"), 2, BATCH), 0)
    assert set(FORMS) | {"single"} == set(strategies.names())


@pytest.mark.parametrize(("name", "work"), cases(2, WORKLOADS))
def test_every_rank_of_two_sends_and_keeps_what_the_formula_says(
    name: str, work: str, ranks2: Ranks
) -> None:
    hold(name, work, ranks2, 2)


@pytest.mark.parametrize(("name", "work"), cases(4, ("gpt-mini", "resnet-mini")))
def test_every_rank_of_four_does_too(name: str, work: str, ranks4: Ranks) -> None:
    hold(name, work, ranks4, 4)


@pytest.mark.parametrize("name", THREE_AXES)
def test_and_every_rank_of_eight_on_three_axes(name: str, ranks8: Ranks) -> None:
    hold(name, "gpt-mini", ranks8, 8)


@pytest.mark.parametrize("work", ["mlp", "gpt-mini", "resnet-mini"])
@pytest.mark.parametrize("devices", [2, 3])
def test_the_copies_of_data_parallel_are_the_formula(work: str, devices: int) -> None:
    from pardemo.launch import launch

    scene = Scene(workload(work), devices, BATCH)
    maker = inside.Maker("data_parallel", scene.work, BATCH, (("devices", devices),))
    seen = launch(inside.look, maker, 1, nprocs=1)[0]
    same_bytes("data_parallel", scene, 0, seen)
    found = same_memory("data_parallel", scene, 0, seen)
    if work == "resnet-mini":  # autograd keeps more of a BatchNorm over replicas than of one alone
        here = found.memory["activations_bytes"]
        assert found.formula["activations_bytes"] == pytest.approx(here, rel=0.05)
        assert found.peak_error is not None
        assert abs(found.peak_error) < 0.25, found.cells()


@pytest.mark.parametrize("ranks", ["ranks2", "ranks4"])
@pytest.mark.parametrize(
    ("name", "work", "knobs"),
    [
        ("tensor", "gpt-mini", {"sequence_parallel": True}),
        ("context", "gpt-mini", {"balance": "zigzag"}),
        ("context", "gpt-mini", {"method": "ulysses"}),
        ("context", "moe-mini", {"balance": "zigzag"}),
    ],
)
def test_activations_of_cut_tokens_are_those_of_one_process_with_made_up_neighbours(
    name: str, work: str, knobs: dict[str, object], ranks: str, request: pytest.FixtureRequest
) -> None:
    group, count = request.getfixturevalue(ranks), int(ranks[-1])
    scene = Scene(workload(work), count, BATCH)
    maker = inside.Maker(name, scene.work, BATCH, tuple(knobs.items()))
    for rank, seen in enumerate(group(inside.look, maker, count)):
        found = same_memory(name, scene, rank, seen, **knobs)
        if work == "gpt-mini":  # where a router sends its rows, shapes do not say
            here = found.memory["activations_bytes"]
            assert found.formula["activations_bytes"] == pytest.approx(here, rel=0.01)


def test_the_rows_that_experts_get_are_taken_to_be_even_on_four_ranks(ranks4: Ranks) -> None:
    hold("expert", "moe-mini", ranks4, 4)


def test_a_knob_that_changes_the_shapes_otherwise_has_no_forecast() -> None:
    scene = Scene(workload("gpt-mini"), 2, BATCH)
    assert weights.forecast("tensor", scene, 0, 2, {"loss_parallel": True}) == {}


def test_who_has_a_gradient_is_asked_where_the_sum_is_zero(ranks4: Ranks) -> None:
    scene = Scene(workload("tests.strategies.unseen:unused"), 4, 12)
    assert len(scene.idle) == 2  # weight and bias of the layer that is never called
    seen = ranks4(inside.look, inside.Maker("dp_tp", scene.work, 12), 4)
    for rank, one in enumerate(seen):
        same_bytes("dp_tp", scene, rank, one)
        formula = closed_form("dp_tp", scene, rank)
        assert formula is not None
        (asked,) = [m for m in formula.messages if "that is zero" in m.formula]
        assert asked.sent_bytes == 2 * 4  # 2(d-1)/d = 1


def test_a_traced_model_is_cut_anew_for_microbatches_and_masks_have_no_gradient(
    ranks2: Ranks,
) -> None:
    """torch's tracer writes the number of samples into a stage, so each number has its own."""
    scene = Scene(workload("tests.strategies.unseen:padded"), 2, 12)
    for name in ("model_parallel", "pipeline"):
        for rank, one in enumerate(ranks2(inside.look, inside.Maker(name, scene.work, 12), 2)):
            same_bytes(name, scene, rank, one)
            same_memory(name, scene, rank, one)
    there, back = (closed_form("model_parallel", scene, rank) for rank in (0, 1))
    assert there is not None
    assert back is not None
    assert there.messages[0].sent_bytes > back.messages[0].sent_bytes


def test_one_rank_sends_nothing_and_an_unknown_strategy_has_no_form() -> None:
    assert closed_form("ddp", Scene(workload("mlp"), 1, BATCH), 0).total == 0
    assert closed_form("mine", Scene(workload("mlp"), 2, BATCH), 0) is None
