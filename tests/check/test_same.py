"""same() says who drifted, when and by how much, and stays silent about rounding."""

from __future__ import annotations

import torch

from pardemo.check import Trace, same


def state(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((2, 2), value), "a.bias": torch.zeros(2)}


def trace(*values: float) -> Trace:
    return Trace(tuple(values), tuple(state(v) for v in values))


def test_equal_states_pass_and_the_verdict_counts_what_was_compared() -> None:
    verdict = same([state(), state()], state())
    assert verdict
    assert "2 ranks equal one process: 4 values compared" in repr(verdict)


def test_the_drifted_rank_tensor_and_size_are_named() -> None:
    verdict = same([state(), state(1.5), state()], state())
    assert not verdict
    assert "rank 1 of 3 drifted" in repr(verdict)
    assert "a.weight is off by 5.0e-01" in repr(verdict)


def test_the_earliest_step_is_blamed_not_the_worst() -> None:
    verdict = same([trace(1, 1.01, 9), trace(1, 1, 1)], trace(1, 1, 1))
    assert "rank 0 of 2 drifted" in repr(verdict)
    assert "at step 1: " in repr(verdict)
    assert "1.0e-02" in repr(verdict)


def test_when_all_ranks_drift_together_that_is_said() -> None:
    assert "every rank drifted" in repr(same([state(2), state(2)], state()))


def test_rounding_is_tolerated_relative_to_the_tensors_scale_and_no_more() -> None:
    big = {"w": torch.full((3,), 1000.0)}
    assert same([{"w": big["w"] + 0.01}], big)
    assert not same([{"w": big["w"] + 1.0}], big)
    exact = {"w": big["w"].double()}
    assert not same([{"w": exact["w"] + 1e-4}], exact)
    assert same([{"w": exact["w"] + 1e-4}], exact, tolerance=1e-6)


def test_rounding_that_adamw_makes_larger_is_no_drift_and_a_small_step_is() -> None:
    began_at_zero = {"in_proj_bias": torch.full((3,), 1e-3, dtype=torch.float64)}
    assert same([{"in_proj_bias": began_at_zero["in_proj_bias"] + 1e-11}], began_at_zero)
    assert not same([{"in_proj_bias": began_at_zero["in_proj_bias"] + 1e-9}], began_at_zero)


def test_a_nan_on_one_side_is_never_the_same() -> None:
    assert not same([state(float("nan"))], state())


def test_integers_must_be_equal() -> None:
    assert not same([{"n": torch.tensor(3)}], {"n": torch.tensor(4)})


def test_other_keys_shapes_and_lengths_are_said_in_words() -> None:
    assert "a.bias" in repr(same([{"a.weight": torch.ones(2, 2)}], state()))
    assert "shape (3,), expected (2,)" in repr(same([torch.ones(3)], torch.ones(2)))
    assert "2 steps, expected 3" in repr(same([[1.0, 2.0], [1.0, 2.0]], [1.0, 2.0, 3.0]))
    assert not same([], state())


def test_a_single_value_and_a_list_of_steps_stand_for_one_rank() -> None:
    assert "1 rank equals" in repr(same(state(), state()))
    assert "1 rank equals" in repr(same([state(), state(2)], [state(), state(2)]))
    assert same([[state(), state(2)], [state(), state(2)]], [state(), state(2)])
