"""The suite's predictions: what of one process's work a rank keeps, and what a strategy adds."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from pardemo import predict
from pardemo.measure.causes_sent import FIRST_CAP
from pardemo.suite.foresee import Part, needed, overlap, part_cases, read_parts
from pardemo.suite.foresee_terms import additions, changing_linears, each_message, slices
from pardemo.suite.forms import closed_form
from pardemo.suite.scene import Scene
from pardemo.workloads import workload

SCENE = Scene(workload("gpt-mini"), 2, 16)


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


def test_a_part_is_a_share_of_the_samples_or_a_slice_of_all_of_them():
    keys = {name: needed(SCENE, name) for name in ("ddp", "fsdp", "pipeline", "model_parallel")}
    assert keys == {"ddp": 8, "fsdp": 8, "pipeline": 4, "model_parallel": 16}
    assert needed(SCENE, "tensor") == "tensor"
    pictures = Scene(workload("resnet-mini"), 2, 16)  # its BatchNorm counts over all ranks
    assert (needed(pictures, "ddp"), needed(pictures, "pipeline")) == ("statistics", 16)
    assert {c.make for c in part_cases(pictures, ["ddp"]).values()} == {
        Part(pictures.work, 8), Part(pictures.work, 8, cut="statistics"),
        Part(pictures.work, 8, optimizer="whole"),
    }  # fmt: skip
    cases = part_cases(SCENE, ["tensor", "pipeline", "context"])
    made = {case.make for case in cases.values()}
    work = SCENE.work
    assert made == {
        Part(work, 4), Part(work, 8), Part(work, 16, cut="tensor"), Part(work, 16, cut="context"),
        Part(work, 8, optimizer="whole"), Part(work, 8, optimizer="slices"),
    }  # fmt: skip


def test_the_optimiser_is_what_it_adds_behind_a_backward_pass():
    told = {"part: 8 samples": 2.0, "part: with the optimizer": 2.6, "part: on slices": 3.5,
            "part: a rank's part under tensor": 3.0}  # fmt: skip
    found = {name: SimpleNamespace(median_s=s) for name, s in told.items()}
    parts = read_parts(SCENE, ["tensor", "ddp"], found)
    assert parts.by_size == {8: 2.0, "tensor": 3.0}
    assert parts.optimizer_s == pytest.approx(0.6)
    assert parts.slice_s == pytest.approx((1.5 - 0.6 / 2) / len(SCENE.parameters))


def test_a_ranks_slice_computes_less_than_the_whole_and_sends_nothing(ranks2):
    with_whole, *cut = (
        list(ranks2(counted, Part(SCENE.work, 4, cut=cut))) for cut in ("", "tensor", "context")
    )
    for found in cut:
        assert all(c < w for (c, _), (w, _) in zip(found, with_whole, strict=True))
    assert all(sent == 0 for found in (with_whole, *cut) for _, sent in found)
    (first, _), (second, _) = cut[1]
    assert first < second  # causal: the later positions see the earlier ones too


def test_a_rank_of_experts_runs_its_own_ones_on_as_many_rows_and_sends_nothing(ranks2):
    work = workload("moe-mini")
    whole, mine = (list(ranks2(counted, Part(work, 8, cut=cut))) for cut in ("", "expert"))
    assert all(sent == 0 for _, sent in mine)
    for (with_all, _), (with_own, _) in zip(whole, mine, strict=True):
        assert with_own == pytest.approx(with_all, rel=0.1)  # fewer experts, not fewer rows
    assert needed(Scene(work, 2, 16), "expert") == "expert"


def counted(part):
    """On a rank: FLOPs of one part, and collectives that it calls."""
    from torch.distributed.device_mesh import init_device_mesh

    from pardemo.measure.flops import count_flops
    from pardemo.measure.traffic import Counting

    step = part(init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)))
    with Counting() as counting:
        flops = count_flops(step).total
    return flops, len(counting.calls)


def test_what_a_strategy_adds_is_named_and_the_others_add_nothing():
    config = SCENE.model.config
    (tensor,) = additions("tensor", SCENE, _machine())
    linears = 6 * config.n_layer  # wq, wk, wv, wo and two of the feed-forward
    assert tensor.value == pytest.approx(linears * 2e-4)
    sharded = {t.name: t.value for t in additions("fsdp", SCENE, _machine())}
    assert set(sharded) == {"units", "unit tensors", "copies"}
    assert sharded["unit tensors"] == pytest.approx(len(SCENE.parameters) * 1e-4)
    assert additions("ddp", SCENE, _machine()) == []


def test_only_layers_of_experts_meet_a_new_shape_in_every_step():
    assert changing_linears(SCENE) == set()
    found = changing_linears(Scene(workload("moe-mini"), 2, 16))
    assert found
    assert all(".experts." in name for name in found)


def test_an_optimiser_over_slices_pays_for_every_sliced_tensor():
    (sharded,) = slices("fsdp", SCENE, 1e-3)
    assert sharded.value == pytest.approx(len(SCENE.parameters) * 1e-3)
    (cut,) = slices("tensor", SCENE, 1e-3)
    weights = 6 * SCENE.model.config.n_layer  # of each layer; norms, embedding and head stay whole
    assert cut.value == pytest.approx(weights * 1e-3)
    assert slices("ddp", SCENE, 1e-3) == slices("fsdp", SCENE, 0.0) == []


def test_messages_are_priced_as_they_are_calibrated_and_their_bytes_stay():
    for name in ("zero1", "context", "ddp"):
        sent = closed_form(name, SCENE, 1)
        priced = each_message(name, SCENE, sent)
        assert priced.total == pytest.approx(sent.total)
    by_size = [m for m in each_message("zero1", SCENE, closed_form("zero1", SCENE, 1)).messages
               if m.kind == "broadcast"]  # fmt: skip
    assert sum(m.calls for m in by_size) == len(list(SCENE.model.parameters()))
    assert len(by_size) == len({p.numel() for p in SCENE.model.parameters()})
    ring = each_message("context", SCENE, closed_form("context", SCENE, 1))
    assert ring.calls("send") == 0
    assert all(m.beside for m in ring.messages if m.kind == "all_to_all")


def test_chains_of_experts_are_foretold_without_data_to_choose_them():
    experts = Scene(workload("moe-mini"), 2, 16)
    sizes = {"pipeline": 8, "model_parallel": 8}
    width, tokens = experts.model.config.n_embd, 16 * experts.model.config.block_size
    for name, loss in sizes.items():
        sent = closed_form(name, experts, 1)
        handed = next(m for m in sent.messages if m.kind == "send")
        assert handed.calls == 1  # choices are counted over the batch: one microbatch
        assert tokens * width * 4 <= handed.payload_bytes <= tokens * width * 4 + 8
        assert next(m for m in sent.messages if m.kind == "broadcast").payload_bytes == loss


def test_gradients_go_in_buckets_and_only_the_last_has_no_computation_beside_it():
    sent = each_message("ddp", SCENE, closed_form("ddp", SCENE, 1))
    first, last, loss = sorted(sent.messages, key=lambda m: (m.phase != "backward", not m.beside))
    assert (first.beside, last.beside, loss.beside) == (True, False, False)
    assert (
        FIRST_CAP <= first.payload_bytes < FIRST_CAP + max(p.numel() * 4 for p in SCENE.parameters)
    )
    assert first.payload_bytes + last.payload_bytes == 4 * SCENE.elements


def test_nothing_is_hidden_where_every_core_computes():
    seen = {"hidden_share": 0.4, "slowdown": 1.0}
    machine = dataclasses.replace(_machine(), overlap=seen)
    assert overlap(machine, SCENE, 2) == {"hidden_share": 0.0, "slowdown": 1.0}
    assert overlap(machine, SCENE, 4) == seen
    assert overlap(machine, dataclasses.replace(SCENE, backend="nccl"), 2) == seen
