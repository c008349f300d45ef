"""Cuts are balanced exactly, the same everywhere, and refused when impossible."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pardemo.strategies.base import StrategyError, cut, cut_by_hand, entering


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(1, 8))
def test_no_other_cut_has_a_smaller_largest_part(costs: list[int], parts: int) -> None:
    if parts > len(costs):
        with pytest.raises(StrategyError, match="cannot cut"):
            cut(costs, parts)
        return
    found = cut(costs, parts)
    assert [i for part in found for i in part] == list(range(len(costs)))
    assert all(len(part) > 0 for part in found)
    best = min(
        max(
            sum(costs[a:b])
            for a, b in itertools.pairwise([0, *inner, len(costs)])
        )
        for inner in itertools.combinations(range(1, len(costs)), parts - 1)
    )  # fmt: skip
    assert max(sum(costs[i] for i in part) for part in found) == best


def test_by_hand_the_named_pieces_begin_the_parts() -> None:
    names = ["a", "b", "c", "d"]
    assert cut_by_hand(names, ["b", "d"], 3) == [range(1), range(1, 3), range(3, 4)]


@pytest.mark.parametrize(
    ("starts", "said"),
    [
        (["b"], "3 stages need 2 names to start at, got 1"),
        (["b", "x"], "no piece is called 'x'; pieces are a, b, c"),
        (["c", "b"], "model's order"),
        (["a", "b"], "model's order"),
    ],
)
def test_wrong_names_are_refused(starts: list[str], said: str) -> None:
    with pytest.raises(StrategyError, match=said):
        cut_by_hand(["a", "b", "c"], starts, 3)


def test_what_enters_a_part_may_be_changed_in_place_and_is_no_copy() -> None:
    arrived = torch.tensor([-1.0, 2.0], requires_grad=True)
    with pytest.raises(RuntimeError, match="in-place operation"):
        arrived.view_as(arrived).relu_()
    entered = entering(arrived)
    assert entered.data_ptr() == arrived.data_ptr()
    entered.relu_().backward(torch.tensor([5.0, 7.0]))
    assert arrived.grad is not None
    assert arrived.grad.tolist() == [0.0, 7.0]
    whole = torch.ones(2)
    assert entering(whole) is whole  # the model's own input, which asks for no gradient
