"""Closed forms of the bytes: spot values worked out by hand, and laws that must hold."""

from __future__ import annotations

import pytest

from pardemo import predict
from pardemo.predict.sent_model_rules import stage_owner

P = 1000


def test_one_process_sends_nothing():
    assert predict.sent_bytes("single").total == 0
    assert "sends nothing" in repr(predict.sent_bytes("single"))


def test_ddp_sends_twice_n_minus_1_over_n_of_the_gradients():
    assert predict.sent_bytes("ddp", ranks=4, parameters=P).total == 2 * 3 / 4 * P * 4


def test_forgetting_no_sync_costs_one_all_reduce_per_microbatch():
    once = predict.sent_bytes("ddp", ranks=2, parameters=P, microbatches=8)
    each = predict.sent_bytes("ddp", ranks=2, parameters=P, microbatches=8, no_sync=False)
    assert each.total == 8 * once.total
    assert (once.calls("all_reduce"), each.calls("all_reduce")) == (1, 8)


def test_a_half_precision_hook_halves_ddp():
    full = predict.sent_bytes("ddp", ranks=4, parameters=P, buckets=3)
    half = predict.sent_bytes("ddp", ranks=4, parameters=P, buckets=3, hook_bytes_per_element=2)
    assert half.total == full.total / 2
    assert half.calls("all_reduce") == 3


def test_zero_1_sends_what_ddp_sends_and_zero_2_m_plus_1_halves_of_it():
    ddp = predict.sent_bytes("ddp", ranks=4, parameters=P).total
    assert predict.sent_bytes("zero1", ranks=4, parameters=P).total == ddp
    for m in (1, 2, 5):
        zero2 = predict.sent_bytes("zero2", ranks=4, parameters=P, microbatches=m)
        assert zero2.total == (m + 1) * ddp / 2


def test_zero_1_by_broadcast_sends_every_tensor_to_all_others_besides_the_all_reduce():
    s = predict.sent_bytes("zero1", ranks=4, parameters=P, style="all_reduce_broadcast", frozen=8)
    assert s.by_kind() == {"all_reduce": 1.5 * P * 4, "broadcast": 3 * (P + 8) * 4 / 4}


@pytest.mark.parametrize("implementation", ["textbook", "gloo"])
def test_however_a_broadcast_is_passed_on_everybody_but_the_root_gets_it_once(implementation):
    for n in range(2, 18):
        copies = [predict.broadcast_copies(n, place, implementation) for place in range(n)]
        assert sum(copies) == n - 1
        assert copies[-1] == 0
    tree = [predict.broadcast_copies(6, place, "gloo") for place in range(6)]
    assert tree == [3, 2, 0, 0, 0, 0]  # 0 -> 1, 0 -> 2, 1 -> 3, 0 -> 4, 1 -> 5
    assert [predict.broadcast_copies(3, place) for place in range(3)] == [1, 1, 0]
    with pytest.raises(ValueError, match="place 3 does not exist among 3 ranks"):
        predict.broadcast_copies(3, 3)


def test_fsdp_gathers_twice_but_the_root_once():
    s = predict.sent_bytes("fsdp", ranks=4, parameters=P, root=100, units=3)
    assert s.by_kind()["all_gather"] == 3 / 4 * 4 * (2 * P - 100)
    assert s.by_kind()["reduce_scatter"] == 3 / 4 * 4 * P
    assert (s.calls("all_gather"), s.calls("reduce_scatter")) == (5, 3)


def test_fsdp_that_keeps_parameters_gathers_once():
    s = predict.sent_bytes(
        "fsdp", ranks=4, parameters=P, root=100, units=3, reshard_after_forward=False
    )
    assert s.by_kind()["all_gather"] == 3 / 4 * 4 * P
    assert s.calls("all_gather") == 3


def test_gloo_carries_out_reduce_scatter_as_an_all_reduce():
    textbook = predict.sent_bytes("fsdp", ranks=4, parameters=P)
    gloo = predict.sent_bytes("fsdp", ranks=4, parameters=P, implementation="gloo")
    assert gloo.by_kind()["reduce_scatter"] == 2 * textbook.by_kind()["reduce_scatter"]
    # 3 (n-1)/n becomes 4 (n-1)/n
    assert gloo.total / textbook.total == pytest.approx(4 / 3)


def test_hsdp_shards_inside_and_all_reduces_the_shards_between():
    s = predict.sent_bytes("hsdp", shard=4, replicate=2, parameters=P)
    assert s.by_axis() == {"shard": 3 * 3 / 4 * P * 4, "replicate": 2 * 1 / 2 * P * 4 / 4}


@pytest.mark.parametrize(("recompute", "count"), [(False, 4), (True, 6)])
def test_tensor_parallel_all_reduces_the_activation_four_or_six_times_a_layer(recompute, count):
    s = predict.sent_bytes("tensor", ranks=2, layers=3, activation_bytes=100, recompute=recompute)
    assert s.calls("all_reduce") == count * 3
    assert s.total == count * 3 * 100


def test_sequence_parallel_sends_the_same_bytes_in_two_halves():
    plain = predict.sent_bytes("tensor", ranks=4, layers=2, activation_bytes=64)
    split = predict.sent_bytes(
        "tensor", ranks=4, layers=2, activation_bytes=64, sequence_parallel=True
    )
    assert split.total == plain.total
    assert set(split.by_kind()) == {"all_gather", "reduce_scatter"}


def test_inner_stages_send_both_ways_and_the_ends_one():
    each = [
        predict.sent_bytes("pipeline", ranks=4, rank=r, activation_bytes=10, microbatches=8).total
        for r in range(4)
    ]
    assert each == [80, 160, 160, 80]


def test_interleaving_multiplies_what_stages_send():
    m, a = 8, 10
    total = sum(
        predict.sent_bytes(
            "pipeline", ranks=4, rank=r, activation_bytes=a, microbatches=m, chunks=2
        ).total
        for r in range(4)
    )
    assert total == 2 * 7 * m * a  # 7 boundaries between 8 stages, each crossed both ways


def test_the_two_middle_stages_of_a_v_schedule_share_a_rank():
    assert [stage_owner(s, 3, 2, v_shape=True) for s in range(6)] == [0, 1, 2, 2, 1, 0]
    last = predict.sent_bytes(
        "pipeline", ranks=3, rank=2, activation_bytes=1, chunks=2, v_shape=True
    )
    assert last.total == 2


def test_ring_attention_rotates_kv_once_forward_and_twice_backward():
    s = predict.sent_bytes("context", ranks=4, layers=2, kv_bytes=400)
    assert s.total == 2 * 3 * 3 / 4 * 400
    home = predict.sent_bytes("ring", ranks=4, layers=2, kv_bytes=400, return_gradients=True)
    assert home.total == s.total + 2 * 100


def test_ulysses_sends_eight_all_to_alls_a_layer():
    s = predict.sent_bytes(
        "context", ranks=4, layers=1, kv_bytes=800, q_bytes=400, variant="ulysses"
    )
    assert s.calls("all_to_all") == 8
    assert s.total == 3 / 4 * 8 * 400 / 4


def test_experts_dispatch_and_combine_forward_and_backward():
    assert predict.sent_bytes("expert", ranks=4, layers=2, routed_bytes=100).total == 4 * 2 * 75


def test_combinations_add_up():
    both = predict.sent_bytes("ddp", ranks=2, parameters=P) + predict.sent_bytes(
        "tensor", ranks=2, layers=1, activation_bytes=10
    )
    assert both.total == 4000 + 40
    assert both.by_axis() == {"dp": 4000.0, "tp": 40.0}


def test_uneven_shards_are_padded_to_whole_rows():
    assert predict.padded([(5, 3), (4,)], ranks=2) == 22
    assert predict.padded([(8, 3), (4,)], ranks=4) == 28


def test_every_strategy_at_degree_one_sends_nothing():
    small = {"ranks": 1, "parameters": P}
    for name in ("ddp", "zero1", "zero2", "fsdp"):
        assert predict.sent_bytes(name, **small).total == 0
    assert predict.sent_bytes("pipeline", ranks=1, activation_bytes=5).total == 0
    assert predict.sent_bytes("context", ranks=1, layers=2, kv_bytes=5).total == 0


def test_unknown_names_and_knobs_are_named():
    with pytest.raises(ValueError, match="no closed form for 'dpp'"):
        predict.sent_bytes("dpp")
    with pytest.raises(TypeError, match="bucketss"):
        predict.sent_bytes("ddp", ranks=2, parameters=1, bucketss=1)


def test_the_reported_loss_is_one_more_all_reduce():
    s = predict.sent_bytes("ddp", ranks=4, parameters=P, loss_bytes=4)
    assert s.by_axis()["loss"] == 6
    assert s.calls("all_reduce") == 2


def test_wire_factors_are_those_of_nccl_tests():
    assert predict.wire_factor("all_reduce", 8) == pytest.approx(1.75)
    assert predict.wire_factor("all_gather", 8) == pytest.approx(0.875)
    assert predict.wire_factor("broadcast", 8) == 1
    assert predict.wire_bytes("alltoall", 800, 4) == 600
    with pytest.raises(ValueError, match="unknown collective"):
        predict.wire_factor("all_red", 2)


def test_forward_and_backward_are_told_apart():
    fsdp = predict.sent_bytes("fsdp", ranks=2, parameters=P, root=100, units=3, loss_bytes=4)
    assert fsdp.by_phase() == {"forward": P * 2 + 4, "backward": (P - 100) * 2 + P * 2}
    zero1 = predict.sent_bytes("zero1", ranks=4, parameters=P, style="all_reduce_broadcast")
    assert zero1.by_phase() == {"backward": 1.5 * P * 4, "optimizer": 3 * P}
    again = predict.sent_bytes("tensor", ranks=2, layers=1, activation_bytes=10, recompute=True)
    assert again.by_phase() == {"forward": 20, "backward": 40}  # the forward again, and its own 2
    ends = [predict.sent_bytes("pipeline", ranks=3, rank=r, activation_bytes=5) for r in range(3)]
    assert [end.by_phase() for end in ends] == [
        {"forward": 5}, {"forward": 5, "backward": 5}, {"backward": 5}
    ]  # fmt: skip


def test_frozen_parameters_are_gathered_but_not_reduced():
    s = predict.sent_bytes("fsdp", ranks=2, parameters=P, frozen=400)
    assert s.by_kind() == {"all_gather": 2 * P * 2, "reduce_scatter": (P - 400) * 2}


def test_a_message_says_how_many_ranks_take_part():
    s = predict.sent_bytes("hsdp", shard=4, replicate=2, parameters=P)
    assert {m.axis: m.ranks for m in s.messages} == {"shard": 4, "replicate": 2}
