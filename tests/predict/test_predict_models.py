"""FLOPs, memory, curves, profiles: known values, conventions, and clear refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from pardemo import predict
from pardemo.predict import Curve, CurveSet, Layout, Profile, ProfileError, Transformer
from pardemo.predict.columns import by_cost, cannot_start
from pardemo.predict.constants import MEMORY, TIME, vector
from pardemo.predict.flops import forward_per_token

GPT = Transformer(24, 2304, 24, 9216, 51200, 2048)


@pytest.mark.parametrize(
    ("sizes", "gpus", "batch", "tflops", "seconds"),
    # Narayanan 2021, table 1: layers, hidden; GPUs; batch; TFLOP/s per GPU -> seconds by eq. 3
    [((24, 2304), 32, 512, 137, 3.528), ((60, 10240), 1024, 1792, 140, 16.058),
     ((128, 25600), 3072, 3072, 163, 102.63)],
)  # fmt: skip
def test_megatrons_equation_gives_its_own_table(sizes, gpus, batch, tflops, seconds):
    flops = predict.megatron_eq3(*sizes, 51200, 2048, batch)
    assert flops / gpus / (tflops * 1e12) == pytest.approx(seconds, rel=0.005)


def test_the_exact_count_is_megatrons_where_the_shape_is_gpt():
    for convention, recompute in (("megatron", True), ("megatron-model", False)):
        mine = float(predict.step_flops(GPT, 512, predict.CONVENTIONS[convention]))
        theirs = predict.megatron_eq3(24, 2304, 51200, 2048, 512, recompute)
        assert mine == pytest.approx(theirs, rel=1e-9)


def test_conventions_differ_by_what_they_count():
    count = {n: predict.train_per_token(GPT, c) for n, c in predict.CONVENTIONS.items()}
    assert count["palm"] == pytest.approx(count["exact"], rel=1e-9)
    assert count["palm-embedded"] - count["palm"] == 6 * 51200 * 2304
    assert count["megatron"] > count["exact"] > count["6n"]


def test_published_counts_of_flops_per_token_are_reproduced():
    # nanotron scaling_benchmarks: 1B is 16 x 2048, ffn 8192, vocab 131072, 4096 tokens
    one = Transformer(16, 2048, 32, 8192, 131072, 4096, gated=True)
    assert predict.train_per_token(one, predict.CONVENTIONS["palm"]) == 9663676416


def test_a_chain_of_linear_layers_saves_the_first_input_gradient():
    assert predict.linear_train([4, 8, 2], 10) == 2 * 10 * (3 * (32 + 16) - 32)


def test_published_sizes_are_reproduced():
    sizes = {"gpt2": 124.4e6, "gpt3-175b": 174.6e9, "llama3-8b": 8.03e9, "llama3-70b": 70.6e9,
             "llama3-405b": 405.9e9}  # fmt: skip
    for name, size in sizes.items():
        assert predict.model(name).parameters == pytest.approx(size, rel=0.005)


def test_scores_grow_with_the_sequence_and_the_head_with_the_vocabulary():
    _, scores, head = forward_per_token(GPT)
    _, longer, _ = forward_per_token(replace(GPT, seq=4096))
    assert longer == 2 * scores
    assert head == 2 * 2304 * 51200


def test_each_zero_stage_shards_one_thing_more():
    m = predict.model("llama3-8b")
    at = [predict.memory(m, Layout(dp=8, zero=z)) for z in range(4)]
    whole = at[0]
    for name, level in (("optimizer", 1), ("gradients", 2), ("parameters", 3)):
        for z in range(4):
            divided = 8 if z >= level else 1
            assert at[z][name] == pytest.approx(whole[name] / divided)


def test_mixed_precision_states_are_18_bytes_a_parameter():
    m = predict.model("llama3-8b")
    p = predict.memory(m, Layout())
    assert sum(p[k] for k in ("parameters", "gradients", "optimizer")) == pytest.approx(
        18 * m.parameters, rel=1e-3
    )


def test_activations_are_korthikantis_without_dropout_masks():
    # table 2: s b h (34 + 5 a s / h) per layer; 2 of the 34 are dropout masks, not kept here
    from pardemo.predict.columns import columns
    from pardemo.predict.memory import activations_per_layer

    c = columns(GPT, [Layout(microbatch=4)])
    fused = activations_per_layer(c)[0]
    assert fused == 2048 * 4 * 2304 * 32
    unfused = activations_per_layer(c | {"flash": np.zeros(1)})[0]
    assert unfused - fused == 5 * 24 * 2048 * 2048 * 4
    full = activations_per_layer(c | {"recompute": np.full(1, 2.0)})[0]
    assert full == 2048 * 4 * 2304 * 2


def test_a_pipeline_keeps_p_microbatches_and_gpipe_all():
    m = predict.model("llama3-8b")
    one = predict.memory(m, Layout(pp=4, microbatches=16))
    all_of_them = predict.memory(m, Layout(pp=4, microbatches=16, schedule="gpipe"))
    assert all_of_them["activations"] == pytest.approx(4 * one["activations"])


def test_a_stage_without_layers_is_refused():
    with pytest.raises(ValueError, match="a stage would be empty"):
        predict.memory(predict.model("llama3-8b"), Layout(pp=64, microbatches=64))


def test_strategies_on_any_model_count_states_by_their_definition():
    ddp = predict.memory("ddp", parameters=1000, ranks=4)
    assert ddp.value == 16 * 1000
    fsdp = predict.memory("fsdp", parameters=1000, ranks=4, unit_parameters=100)
    assert fsdp.value == 4 * 1000 + 2 * 4 * 100
    zero1 = predict.memory("zero1", parameters=1000, ranks=4)
    assert zero1.value == 8 * 1000 + 2 * 1000
    copies = predict.memory("ddp", parameters=1000, ranks=4, bucket_view=False)
    assert copies["buckets"] == 4000
    with pytest.raises(ValueError, match="no memory formula"):
        predict.memory("nonsense", parameters=1)


SIZES = np.array([1e5, 1e6, 1e7, 1e8])


def _alpha_beta(size):
    return 2e-5 + size / 1e10


def test_a_curve_returns_its_points_and_rises_between_them():
    curve = Curve("all_reduce", 4, 1, SIZES, _alpha_beta(SIZES))
    for s in SIZES:
        assert curve(s)[0] == pytest.approx(_alpha_beta(s))
    between = [curve(s)[0] for s in np.geomspace(1e5, 1e8, 50)]
    assert between == sorted(between)


def test_alpha_and_beta_are_found_again_and_carry_a_curve_outside():
    fit = predict.fit_alpha_beta(SIZES, _alpha_beta(SIZES))
    assert fit.alpha_s == pytest.approx(2e-5)
    assert 1 / fit.beta_s_per_byte == pytest.approx(1e10)
    seconds, evidence = Curve("all_reduce", 4, 1, SIZES, _alpha_beta(SIZES))(1e9)
    assert seconds == pytest.approx(_alpha_beta(1e9), rel=0.01)
    assert evidence.startswith("extrapolated: 1 GB outside")


def test_below_the_smallest_size_only_what_is_no_latency_is_extrapolated():
    def evidence(size, sizes, beta):
        return Curve("all_reduce", 4, 1, sizes, 2e-5 + sizes * beta)(size)[1]

    small = np.array([4096, 1e5, 1e6])
    assert evidence(4, small, 1e-10).startswith("measured latency: 4 B is below 4.096 kB")
    assert evidence(4, small, 1e-8).startswith("extrapolated: 4 B outside")  # half is bandwidth
    assert evidence(4, SIZES, 1e-12).startswith("extrapolated")  # 100 kB: another protocol


def test_a_published_curve_is_interpolated_within_3_percent():
    # VIA-Research/vTrain trace/a100, all-reduce over 8 A100, out of place, microseconds
    size = 2.0 ** np.arange(20, 31)
    time = np.array(
        [92.79, 93.25, 95.8, 134.3, 232.4, 358.1, 579.9, 1162.0, 2162.3, 4191.5, 8193.0]
    )
    kept = np.array([0, 2, 4, 6, 8, 10])
    curve = Curve("all_reduce", 8, 1, size[kept], time[kept] / 1e6)
    error = [abs(curve(s)[0] * 1e6 / t - 1) for s, t in zip(size, time, strict=True)]
    assert np.median([e for e in error if e > 1e-9]) < 0.05


def test_another_world_size_is_extrapolated_and_a_network_refused():
    curves = CurveSet([Curve("all_reduce", 2, 1, SIZES, _alpha_beta(SIZES))])
    assert curves.time("all_reduce", 2, 1, 1e6)[1].startswith("interpolated")
    assert curves.time("all_reduce", 4, 1, 1e6)[1].startswith("extrapolated: 4 ranks")
    with pytest.raises(LookupError, match="several nodes"):
        curves.time("all_reduce", 16, 2, 1e6)


@pytest.mark.parametrize("name", predict.shipped())
def test_shipped_profiles_load_cite_and_come_back_unchanged(name, tmp_path):
    p = predict.load(name)
    assert p.source
    assert p.machine["card"]
    assert predict.load(p.save(tmp_path / "p.json")) == p
    assert len(p.curves()) >= 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "other/9"}, "this version reads"),
        ({"date": "yesterday"}, "not YYYY-MM-DD"),
        ({"per_node": "eight"}, "wrong type"),
        ({"peak_flops": {"bfloat16": -1}}, "must be a number >= 0"),
        ({"collectives": [{"collective": "all_reduce"}]}, r"collectives\[0\]: missing"),
        ({"constants": {"matmul_efficiency": 7.0}}, "outside"),
        ({"constants": {"magic": 1.0}}, "unknown constants"),
        ({"overlap": {"hidden_share": 2}}, "must be 0..1"),
        ({"surprise": 1}, "unknown fields"),
        ({"launch": [1]}, "launch: an object, got list"),
        ({"launch": {"dtensor_s": -1}}, "launch: dtensor_s must be a number >= 0"),
        ({"links": {"node": "fast"}}, "links: node must be a number >= 0"),
        ({"residual": {"p90": float("nan")}}, "residual: p90 must be a number"),
        ({"compute": [7]}, r"compute\[0\]: an object, got int"),
    ],
)
def test_a_bad_profile_is_refused_with_its_field(change, message):
    document = predict.load("a100-dgx").as_dict() | change
    with pytest.raises(ProfileError, match=message):
        predict.load(document)


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"schema": ', "9" * 10_000, "\x00"])
def test_a_hostile_or_cut_profile_file_gives_one_line(tmp_path, text):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ProfileError) as refused:
        predict.load(tmp_path / "p.json")
    assert "\n" not in str(refused.value)


def test_a_profile_cut_anywhere_is_refused(tmp_path):
    whole = json.dumps(predict.load("a100-dgx").as_dict())
    for share in (0.1, 0.5, 0.9, 0.999):
        (tmp_path / "p.json").write_text(whole[: int(share * len(whole))])
        with pytest.raises(ProfileError, match="not JSON"):
            predict.load(tmp_path / "p.json")


def test_a_profile_that_is_not_json_or_not_there_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ProfileError, match="not JSON"):
        predict.load(tmp_path / "x.json")
    with pytest.raises(ProfileError, match="no profile nowhere; shipped: a100-dgx"):
        predict.load("nowhere")
    (tmp_path / "y.json").write_text(json.dumps([1]))
    with pytest.raises(ProfileError, match="a profile is a JSON object"):
        predict.load(tmp_path / "y.json")


@pytest.mark.parametrize("constant", [*TIME, *MEMORY], ids=lambda c: c.name)
def test_every_constant_has_a_unit_a_meaning_and_bounds_around_its_usual_value(constant):
    assert constant.unit
    assert constant.meaning
    assert 0 < constant.low <= constant.usual <= constant.high
    if constant.unit.startswith("of "):
        assert constant.high <= 1.6  # a share of a data sheet; bus bandwidth may pass a link's


def test_constants_outside_their_bounds_are_refused():
    with pytest.raises(ValueError, match="outside"):
        vector(TIME, {"matmul_efficiency": 1.5})


def test_a_profile_without_a_network_says_so():
    p = replace(predict.load("a100-dgx"), links={"node": 3e11})
    assert isinstance(p, Profile)
    with pytest.raises(ProfileError, match=r"links\.network is missing"):
        predict.step(predict.model("llama3-8b"), Layout(dp=16), p)


def test_stages_balanced_by_cost_by_hand():
    # 16 layers and a head as costly as 4: a quarter is 5, a half 10, so 5, 5, 5, 1
    counts, head = by_cost(16, 4.0, 4)
    assert list(counts) == [5, 5, 5, 1]
    assert head == 3
    counts, head = by_cost(16, 4.0, 16)
    assert counts.sum() == 16
    assert head == 13  # the last two stages hold nothing


@pytest.mark.parametrize(
    ("empty", "zero", "dp", "fails"), [(1, 0, 2, True), (1, 1, 2, False), (1, 0, 1, False),
                                       (2, 1, 2, True), (0, 0, 2, False)],
)  # fmt: skip
def test_a_stage_without_parameters_fails_under_unsharded_replicas(empty, zero, dp, fails):
    c = {"empty_stages": np.array([empty]), "zero": np.array([zero]), "dp": np.array([dp])}
    c |= {"pp": np.array([4.0]), "balanced": np.ones(1)}
    assert bool(cannot_start(c)[0]) is fails
    assert bool(cannot_start(c | {"balanced": np.zeros(1)})[0]) is (empty > 0)


def test_the_bubble_is_one_microbatch_through_the_other_stages():
    """7 layers on 2 stages, head aside: the slower stage has 4, so the other 3 are the bubble."""
    model = Transformer(7, 4096, 32, 16384, 1, 2048)
    parts = {
        t.name: t.value for t in predict.step(model, Layout(pp=2, microbatches=8), "a100-dgx").terms
    }
    assert parts["bubble"] == pytest.approx(3 / 4 * parts["compute"] / 8, rel=0.1)
