"""The suite's predictions: what of one process's work a rank keeps, and what a strategy adds."""

from __future__ import annotations

import dataclasses

import pytest

from pardemo import predict
from pardemo.suite.foresee import Parts, alone_s, cut_share, overlap, sizes_needed
from pardemo.suite.foresee_terms import additions, each_message, slices, waiting
from pardemo.suite.forms import closed_form
from pardemo.suite.scene import Scene
from pardemo.workloads import workload

SCENE = Scene(workload("gpt-mini"), 2, 16)
PARTS = Parts({16: 1.0, 8: 0.6}, 0.1)


def _machine() -> predict.Profile:
    rows = [
        {"kind": kind, "flops": f, "forward_s": f / rate, "backward_s": 2 * f / rate}
        for kind, rate in (("attention", 1e10), ("scores", 2e9))
        for f in (1e5, 1e9)
    ]
    return predict.load(
        {
            "schema": predict.SCHEMA, "name": "test", "date": "2026-01-01", "source": "made up",
            "per_node": 2, "memory_bytes": 1e9, "peak_flops": {"float32": 1e9}, "compute": rows,
            "memory_bandwidth": 1e10,
            "launch": {"dtensor_s": 2e-4, "fsdp_s": 1e-3, "fsdp_tensor_s": 1e-4},
        }
    )  # fmt: skip


def test_tensor_parallel_cuts_all_but_the_head_and_launches_every_operator():
    cut = cut_share(SCENE)
    assert 0.8 < cut < 1
    # 0.2 s to launch and 0.8 s of work: cut/2 of the work stays, the rest is whole
    assert alone_s("tensor", SCENE, PARTS) == pytest.approx(0.2 + 0.8 * (1 - cut / 2))
    assert sizes_needed(SCENE, "tensor") == {8, 16}


def test_context_parallel_computes_as_many_tokens_as_half_the_samples():
    assert alone_s("context", SCENE, PARTS) == 0.6
    assert sizes_needed(SCENE, "context") == {8}


def test_what_a_strategy_adds_is_named_and_the_others_add_nothing():
    config = SCENE.model.config
    (tensor,) = additions("tensor", SCENE, _machine())
    linears = 6 * config.n_layer  # wq, wk, wv, wo and two of the feed-forward
    assert tensor.value == pytest.approx(linears * 2e-4)
    sharded = {t.name: t.value for t in additions("fsdp", SCENE, _machine())}
    assert set(sharded) == {"units", "unit tensors", "copies"}
    assert sharded["unit tensors"] == pytest.approx(len(SCENE.parameters) * 1e-4)
    (ring,) = additions("context", SCENE, _machine())
    flops = config.n_layer * 4 * 16 * config.n_embd * config.block_size**2 / 2
    assert ring.value == pytest.approx(3 * flops * (1 / 2e9 - 1 / 1e10), rel=1e-3)
    assert additions("ddp", SCENE, _machine()) == []


def test_an_optimiser_over_slices_pays_for_every_sliced_tensor():
    (sharded,) = slices("fsdp", SCENE, 1e-3)
    assert sharded.value == pytest.approx(len(SCENE.parameters) * 1e-3)
    (cut,) = slices("tensor", SCENE, 1e-3)
    weights = 6 * SCENE.model.config.n_layer  # of each layer; norms, embedding and head stay whole
    assert cut.value == pytest.approx(weights * 1e-3)
    assert slices("ddp", SCENE, 1e-3) == slices("fsdp", SCENE, 0.0) == []


def test_ranks_wait_once_in_a_part_and_oftener_where_they_meet_oftener():
    tensor = closed_form("tensor", SCENE, 1)
    meetings = tensor.calls("all_reduce")
    (wait,) = waiting("tensor", tensor, 2e-3)
    assert wait.value == pytest.approx(2e-3 * (meetings**0.5 - 1))
    zero1 = closed_form("zero1", SCENE, 1)
    (few,) = waiting("zero1", zero1, 2e-3)  # the gradients and the loss: broadcasts come together
    assert few.value == pytest.approx(2e-3 * (2**0.5 - 1))
    assert waiting("pipeline", tensor, 2e-3) == waiting("tensor", tensor, 0.0) == []


def test_messages_are_priced_as_they_are_calibrated_and_their_bytes_stay():
    for name in ("zero1", "context", "ddp"):
        sent = closed_form(name, SCENE, 1)
        priced = each_message(name, SCENE, sent)
        assert priced.total == pytest.approx(sent.total)
    by_size = [m for m in each_message("zero1", SCENE, closed_form("zero1", SCENE, 1)).messages
               if m.kind == "broadcast"]  # fmt: skip
    assert sum(m.calls for m in by_size) == len(list(SCENE.model.parameters()))
    assert len(by_size) == len({p.numel() for p in SCENE.model.parameters()})
    assert each_message("context", SCENE, closed_form("context", SCENE, 1)).calls("send") == 0


def test_nothing_is_hidden_where_every_core_computes():
    seen = {"hidden_share": 0.4, "slowdown": 1.0}
    machine = dataclasses.replace(_machine(), overlap=seen)
    assert overlap(machine, SCENE, 2) == {"hidden_share": 0.0, "slowdown": 1.0}
    assert overlap(machine, SCENE, 4) == seen
    assert overlap(machine, dataclasses.replace(SCENE, backend="nccl"), 2) == seen
