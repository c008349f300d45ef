"""Steps and layouts: terms that add up, limits that must hold, refusals, and the large search."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest

from pardemo import predict
from pardemo.predict import Cluster, Layers, Layout, Profile, Refused
from pardemo.predict import sent as sending
from pardemo.predict.plan_cli import main as plan_main
from pardemo.predict.plan_cli import parse_model
from pardemo.predict.step import step_seconds
from pardemo.predict.strategy_step import transfer_seconds

LLAMA = predict.model("llama3-8b")
SIZES = (1e4, 1e6, 1e8)


def _machine(**changes: object) -> Profile:
    """A made-up two-rank machine: 10 us + 1 GB/s all-reduces, 1 GFLOP/s, no overlap."""
    points = [
        {"collective": k, "ranks": 2, "nodes": 1, "size_bytes": s, "time_s": 1e-5 + s / 1e9}
        for k in ("all_reduce", "send")
        for s in SIZES
    ]
    compute = [
        {"kind": "linear", "flops": f, "forward_s": f / 1e9, "backward_s": 2 * f / 1e9}
        for f in (1e5, 1e7, 1e9)
    ]
    document = {
        "schema": predict.SCHEMA, "name": "test", "date": "2026-01-01", "source": "made up",
        "per_node": 2, "memory_bytes": 1e9, "peak_flops": {"float32": 1e9},
        "collectives": points, "compute": compute,
        "optimizer": {"name": "sgd", "seconds_per_parameter": 1e-9, "fixed_s": 1e-4},
    }  # fmt: skip
    return predict.load(document | changes)


def test_the_terms_of_a_step_add_up_and_each_has_a_formula_and_evidence():
    p = predict.step(LLAMA, Layout(dp=2, tp=4, pp=2, microbatches=8, zero=1), "h100-dgx")
    assert sum(t.value for t in p) == pytest.approx(float(p))
    assert all(t.formula and "profile h100-dgx" in t.evidence for t in p)
    assert p.lo < p.value < p.hi
    assert "compute" in p.table()


def test_a_step_is_never_faster_than_its_flops_at_the_peak():
    for layout in (Layout(), Layout(dp=8, zero=3), Layout(tp=8), Layout(pp=4, microbatches=8)):
        p = predict.step(LLAMA, layout, "h100-dgx")
        flops = float(predict.step_flops(LLAMA, layout.global_batch, predict.CONVENTIONS["palm"]))
        causal = flops - 6 * LLAMA.layers * LLAMA.hidden * LLAMA.seq**2 * layout.global_batch
        assert p.value > causal / layout.ranks / 989e12


def test_each_axis_pays_its_own_term_and_degree_one_pays_none():
    def of(**axes):
        return {t.name for t in predict.step(LLAMA, Layout(**axes), "h100-dgx")}

    assert not {"tensor", "context", "experts", "bubble", "transfer", "exposed"} & of()
    assert "tensor" in of(tp=2)
    assert "context" in of(cp=2)
    assert {"bubble", "transfer"} <= of(pp=2, microbatches=4)
    assert "exposed" in of(dp=2)


def test_more_microbatches_shrink_the_share_of_the_bubble():
    share = []
    for m in (4, 8, 32):
        p = predict.step(LLAMA, Layout(pp=4, microbatches=m), "h100-dgx")
        share.append(p["bubble"] / p.value)
    assert share == sorted(share, reverse=True)


def test_full_recomputation_costs_a_third_more_compute():
    plain = predict.step(LLAMA, Layout(), "h100-dgx")["compute"]
    again = predict.step(LLAMA, Layout(recompute="full"), "h100-dgx")["compute"]
    assert again / plain == pytest.approx(4 / 3, rel=1e-3)


def test_a_run_far_beyond_the_calibrated_nodes_is_refused_and_a_nearer_one_labelled():
    with pytest.raises(Refused, match="more than 4 times"):
        predict.step(LLAMA, Layout(dp=8 * 2000), "a100-dgx")
    assert predict.step(LLAMA, Layout(dp=8 * 500), "a100-dgx").extrapolated
    assert not predict.step(LLAMA, Layout(dp=8 * 300), "a100-dgx").extrapolated


def test_a_strategy_is_compute_plus_what_is_sent_plus_the_optimizer():
    sent = predict.sent_bytes("ddp", ranks=2, parameters=250_000)
    p = predict.step(
        "ddp", profile=_machine(), ranks=2, compute_s=0.1, sent=sent, parameters=250_000
    )
    assert p["compute"] == 0.05
    assert p["dp all_reduce"] == pytest.approx(1e-5 + 1e6 / 1e9, rel=0.01)
    assert p["optimizer"] == pytest.approx(2.5e-4 + 1e-4)


def test_only_a_measured_share_is_hidden():
    sent = predict.sent_bytes("ddp", ranks=2, parameters=250_000)
    shown = predict.step("ddp", profile=_machine(), ranks=2, compute_s=1.0, sent=sent)
    hiding = _machine(overlap={"hidden_share": 0.75, "slowdown": 1.1})
    hidden = predict.step("ddp", profile=hiding, ranks=2, compute_s=1.0, sent=sent)
    assert hidden["dp all_reduce"] == pytest.approx(shown["dp all_reduce"] / 4 * 1.1)


def test_a_pipeline_waits_as_its_schedule_says():
    p = predict.step("pipeline", profile=_machine(), ranks=2, compute_s=1.0, microbatches=4)
    assert p["compute"] == pytest.approx(0.5)
    assert p.value == pytest.approx(0.5 * 5 / 4)
    naive = predict.step("model_parallel", profile=_machine(), ranks=2, compute_s=1.0)
    assert naive.value == pytest.approx(1.0)


def test_compute_is_read_from_the_calibrated_curve_of_each_layer():
    layers = Layers(("a", "b"), (1e6, 2e6), (10, 10), (0.0, 0.0), (0.0, 0.0))
    p = predict.step("single", profile=_machine(), layers=layers, batch=10)
    assert p.value == pytest.approx(3 * 3e7 / 1e9)
    assert not p.extrapolated
    far = predict.step("single", profile=_machine(), layers=layers, batch=10_000)
    assert far.extrapolated


def test_a_layer_on_data_takes_its_share_of_the_curves_backward_time():
    shape = (("a", "b"), (1e6, 2e6), (10, 10), (0.0, 0.0), (0.0, 0.0))
    layers = Layers(*shape, backward=(1e6, 4e6))
    p = predict.step("single", profile=_machine(), layers=layers, batch=10)
    assert p.value == pytest.approx((3e7 + 5e7) / 1e9)
    with pytest.raises(ValueError, match="one entry per layer"):
        Layers(*shape, backward=(1e6,))


def test_a_collective_that_was_never_measured_is_refused():
    sent = predict.sent_bytes("fsdp", ranks=2, parameters=1000)
    with pytest.raises(Refused, match="no curve of all_gather"):
        predict.step("fsdp", profile=_machine(), ranks=2, compute_s=1.0, sent=sent)


def test_noisier_calibration_rounds_widen_the_interval():
    rng = np.random.default_rng(0)

    def with_rounds(spread):
        row = {"collective": "all_reduce", "ranks": 2, "nodes": 1, "size_bytes": 1e6}
        rounds = list(1e-3 * np.exp(spread * rng.standard_normal(12)))
        return _machine(
            collectives=[row | {"time_s": 1e-3, "rounds_s": rounds}], residual={"p90": 0.05}
        )

    widths = []
    for spread in (0.02, 0.8):
        p = predict.step("single", profile=with_rounds(spread), compute_s=1.0)
        widths.append(p.hi - p.lo)
    assert widths[1] > 2 * widths[0]


def test_405_billion_parameters_on_16384_gpus_are_planned_in_one_evaluation(monkeypatch):
    model, cluster, seen = predict.model("llama3-405b"), Cluster(16384), []

    def counted(columns, *rest):
        seen.append(len(columns["dp"]))
        return step_seconds(columns, *rest)

    monkeypatch.setattr(sys.modules["pardemo.predict.layouts"], "step_seconds", counted)
    plan = predict.layouts(model, cluster, 2048)
    assert len(seen) == 1  # thousands of layouts at once: this is what keeps it under 2 s
    assert seen[0] > 500
    assert plan.counts["tried"] > 10_000
    assert len(plan.top) == 3
    assert all(c.layout.ranks == 16384 and c.layout.global_batch == 2048 for c in plan.choices)


def test_layouts_divide_fit_and_are_ranked():
    plan = predict.layouts(LLAMA, Cluster(8), 256)
    for c in plan.choices:
        assert LLAMA.heads % c.layout.tp == 0
        assert c.layout.pp <= LLAMA.layers
        assert c.memory_bytes <= 80e9
        assert c.time_s == pytest.approx(float(predict.step(LLAMA, c.layout, "h100-dgx")), rel=1e-6)
    sure = [c.time_s for c in plan.choices if c.fits == "yes"]
    assert sure == sorted(sure)
    assert plan.choices[0].tied


def test_what_cannot_fit_is_said():
    plan = predict.layouts(predict.model("llama3-405b"), Cluster(8), 16)
    assert not plan.choices
    assert "no layout of llama3-405b fits" in repr(plan)


def test_the_plan_command_prints_a_table_and_refuses_in_one_line(capsys):
    assert plan_main(["--model", "llama3-8b,seq=4096", "--cluster", "h100-dgx:16"]) == 0
    out = capsys.readouterr().out
    assert "measure these three before you decide" in out
    assert plan_main(["--model", "nothing"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--ranks 0", "--ranks must be at least 1"),
        ("--ranks -4", "got -4"),
        ("--rows 0", "--rows must be at least 1"),
        ("--global-batch -5", "--global-batch must be at least 0"),
        ("--memory-gb nan", "got nan"),
        ("--memory-gb -3", "--memory-gb must be"),
        ("--cluster nowhere:8", "no profile nowhere"),
    ],
)
def test_bad_values_of_a_plan_are_refused_in_one_line(capsys, words, message):
    assert plan_main(["--model", "llama3-8b", *words.split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert message in shown.err


def test_a_model_is_read_from_sizes():
    sizes = "layers=2,hidden=64,heads=4,ffn=256,vocab=100,seq=32"
    assert parse_model(sizes + ",gated=1").matrices == 3
    for bad, message in (("layers=2", "missing hidden"), (sizes + ",x=1", "unknown size 'x'")):
        with pytest.raises(ValueError, match=message):
            parse_model(bad)


def test_what_wrappers_add_is_counted_calls_times_calibrated_seconds():
    from pardemo.predict.strategy_step import wrapper_terms

    p = _machine(launch={"dtensor_s": 2e-4, "fsdp_s": 1e-3}, memory_bandwidth=1e10)
    found = {t.name: t for t in wrapper_terms(p, split_linears=24, units=5, copied_bytes=1e8)}
    assert found["dtensor"].value == pytest.approx(24 * 2e-4)
    assert found["units"].value == pytest.approx(5 * 1e-3)
    assert found["copies"].value == pytest.approx(2 * 1e8 / 1e10)
    assert not wrapper_terms(_machine(), split_linears=24, units=5)
    step_of = predict.step("tensor", profile=p, ranks=2, compute_s=1.0, extra=found.values())
    assert step_of.value == pytest.approx(0.5 + sum(t.value for t in found.values()))


@pytest.mark.parametrize(
    "change",
    [{"layers": "9" * 20}, {"seq": "9" * 20}, {"experts": "9" * 20}, {"layers": "²"},
     {"layers": "1,layers=2"}, {"gated": "2"}, {"experts": "8", "top_k": "9"}, {"heads": "0"}],
)  # fmt: skip
def test_a_plan_of_an_impossible_model_is_one_line_and_exit_two(change, capsys):
    sizes = {"layers": "4", "hidden": "64", "heads": "4", "ffn": "256", "vocab": "99", "seq": "64"}
    words = ",".join(f"{k}={v}" for k, v in (sizes | change).items())
    assert plan_main(["--model", words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1


def test_messages_soon_after_each_other_lie_between_the_two_calibrated_gaps():
    def row(how, gap_s, time_s):
        rows = {"collective": "all_reduce", "ranks": 2, "nodes": 1, "time_s": time_s}
        return [rows | {"how": how, "gap_s": gap_s, "size_bytes": s} for s in (4096, 1048576)]

    curves = [*row("", 4e-3, 1e-3), *row("soon", 2.5e-4, 3e-3), *row("beside", 4e-3, 5e-4)]
    p = _machine(collectives=curves)
    one = sending.message("all_reduce", "dp", 2, 8192, "made up")

    def seconds(gap_s, **change):
        sent = sending.SentBytes("x", (dataclasses.replace(one, **change),))
        return transfer_seconds(sent, 2, 1, p, gap_s)[0].value

    times = [seconds(gap) for gap in (1e-5, 2.5e-4, 1e-3, 4e-3, 1.0)]
    assert times == pytest.approx([3e-3, 3e-3, 2e-3, 1e-3, 1e-3])
    assert seconds(1e-5, beside=True) == pytest.approx(5e-4)
    assert seconds(1e-5, phase="optimizer") == pytest.approx(1e-3)
