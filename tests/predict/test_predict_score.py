"""`pardemo score`: synthetic tables with a known answer, the shipped papers, malformed files."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from pardemo import predict
from pardemo.predict.columns import finish, take
from pardemo.predict.constants import TIME, vector
from pardemo.predict.fit import fit
from pardemo.predict.flop_check import flop_stats
from pardemo.predict.physics import seconds
from pardemo.predict.runs import runs
from pardemo.predict.score_cli import main
from pardemo.predict.stats import auc, errors, rank_correlation, regret
from pardemo.predict.tables import TableError, read

TRUTH = {"matmul_efficiency": 0.6, "layer_launch_s": 4e-4, "node_bandwidth": 0.4, "step_s": 0.02}


def _write(path, header, rows):
    with path.open("w", newline="") as f:
        csv.writer(f).writerows([header, *rows])
    return path


def _iterations(tmp_path, count=120, noise=0.02):
    """A table of runs that the physics itself made with TRUTH, and a little noise."""
    rng = np.random.default_rng(1)
    header = ["n_gpus", "global_batch", "micro_batch", "hidden_size", "attention_heads",
              "n_layers", "sequence_length", "tensor_parallelism", "data_parallelism",
              "pipeline_parallelism", "iter_ms", "gpu"]  # fmt: skip
    rows = []
    for _ in range(count):
        tp, dp, pp = (int(rng.choice([1, 2, 4])) for _ in range(3))
        micro, m = int(rng.choice([1, 2, 4])), int(rng.choice([1, 2, 8]))
        hidden, layers = int(rng.choice([1024, 2048, 4096])), int(rng.choice([12, 24]))
        rows.append([tp * dp * pp, dp * micro * m, micro, hidden, 16, layers, 1024, tp, dp, pp, 500,
                     "A100"])  # fmt: skip
    path = _write(tmp_path / "runs.csv", header, rows)
    c = runs(read(path)).columns
    times = seconds(c, vector(TIME, TRUTH)) * np.exp(noise * rng.standard_normal(count))
    for row, t in zip(rows, times, strict=True):
        row[10] = f"{1e3 * t:.4f}"
    return _write(path, header, rows)


@pytest.mark.parametrize("parted", [";", "\t"])
def test_cells_may_be_parted_by_semicolons_or_tabs(tmp_path, parted):
    path = _iterations(tmp_path, count=5)
    told = read(path)
    path.write_text(path.read_text().replace(",", parted))
    again = read(path)
    assert (again.kind, again.cells) == (told.kind, told.cells)
    assert len(again) == 5


def test_a_table_made_by_the_physics_is_predicted_within_its_noise(tmp_path):
    found = predict.score(_iterations(tmp_path), 50, seed=3)
    assert found.stats["calibrated"] == 50
    assert found.stats["predicted"] + found.stats["refused"] == 70
    assert found.stats["time"]["median_error"] < 0.03
    assert found.stats["time"]["rank_correlation"] > 0.99
    values = found.fits["time"].values()
    assert values["layer_launch_s"] == pytest.approx(TRUTH["layer_launch_s"], rel=0.3)


def test_fitted_constants_stay_inside_their_bounds_whatever_the_rows_say(tmp_path):
    data = runs(read(_iterations(tmp_path, count=30)))
    absurd = fit(seconds, TIME, data.columns, data.seconds * 1e-4)
    for c in TIME:
        assert c.low * 0.999 <= absurd.values()[c.name] <= c.high * 1.001
    assert absurd.at_bounds()


def test_no_rows_give_the_usual_values_back(tmp_path):
    c = runs(read(_iterations(tmp_path, count=5))).columns
    none = fit(seconds, TIME, take(c, np.array([], int)), np.array([]))
    assert none.values() == pytest.approx({c.name: c.usual for c in TIME})


def test_the_same_seed_chooses_the_same_rows_and_gives_the_same_score(tmp_path):
    path = _iterations(tmp_path, count=16)
    first, again, other = (predict.score(path, 6, seed).json() for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_runs_on_many_more_nodes_than_calibrated_are_refused(tmp_path):
    from pardemo.predict.score_runs import beyond

    c = finish(runs(read(_iterations(tmp_path, 6))).columns)
    c["nodes"] = np.array([1.0, 2, 4, 8, 9, 16])
    refused = beyond(c, np.array([0, 1]), np.array([2, 3, 4, 5]))
    assert list(refused) == [False, False, True, True]


def _layouts(tmp_path, memory_unit=1.0):
    """Layout rows whose memory is 20 bytes per parameter; those above 80 GB ran out."""
    header = ["model", "layers", "hidden", "heads", "ffn", "vocab", "seq", "nodes", "gpus", "mbs",
              "grad_acc", "gbs", "dp", "pp", "tp", "zero", "step_s", "mem_gb", "status",
              "gpu"]  # fmt: skip
    rows = []
    for tp in (1, 2, 4, 8):
        for pp in (1, 2, 4):
            for mbs in (1, 2, 4, 8, 16):
                dp = 64 // tp // pp
                peak = 20e-9 * 8e9 / tp / pp + 3 * mbs / tp
                status, reading = ("ok", peak / memory_unit) if peak < 80 else ("oom_or_crash", "")
                row = ["8B", 32, 4096, 32, 14336, 131072, 4096, 8, 64, mbs, 4, 4 * mbs * dp, dp]
                row += [pp, tp, 1, 2.0 + mbs * 0.8, reading, status, "H100-80GB"]
                rows.append(row)
    return _write(tmp_path / "layouts.csv", header, rows)


def test_out_of_memory_rows_are_foreseen_and_reported(tmp_path):
    found = predict.score(_layouts(tmp_path), 20).stats
    assert found["out_of_memory"]["auc"] > 0.9
    assert found["out_of_memory"]["false_alarms"] < 0.2
    assert found["memory"]["rows"] > 0
    assert found["regret"]["groups"] >= 1


def test_papers_flops_are_reproduced_to_half_a_percent():
    stats = flop_stats(read(predict.published()))
    for name in ("tflops_per_gpu", "tflops_gated", "params_b"):
        assert stats[name]["median_error"] < 0.005
        assert stats[name]["worst_error"] < 0.006


def test_constants_fitted_on_the_papers_are_physical_and_close():
    profile = predict.load("a100-dgx")
    again = predict.fitted(profile, [predict.published()], "A100")
    assert again.calibrated["max_nodes"] == 384
    assert again.residual["median"] < 0.06
    assert 0.4 < again.constants["matmul_efficiency"] <= 0.95


def test_the_command_ends_with_one_json_document(tmp_path, capsys):
    assert main([str(_iterations(tmp_path, 30)), "--calibrate-rows", "10", "--seed", "4"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    document = json.loads(last)
    assert document["kind"] == "iterations"
    assert document["seed"] == 4
    assert {"median_error", "p90_error", "worst_error", "rank_correlation"} <= set(document)
    for constant in document["constants"]["time"].values():
        assert constant["low"] <= constant["value"] <= constant["high"] * 1.001


def test_collective_points_are_predicted_from_their_neighbours(tmp_path):
    rows = [
        ["all_reduce", n, 1, 2**k, f"{10 + n + 2**k / 1e5:.3f}", "X"]
        for n in (2, 4)
        for k in range(16, 27)
    ]
    header = ["collective", "ranks", "nodes", "size_bytes", "time_us", "gpu"]
    stats = predict.score(_write(tmp_path / "c.csv", header, rows)).stats
    assert stats["predicted"] == 2 * 9
    assert stats["time"]["median_error"] < 0.02
    few = predict.score(tmp_path / "c.csv", 8).stats
    assert few["calibrated"] == 8
    assert few["inside"] == few["time"]
    assert few["inside"]["rows"] == 2 * 11 - 8
    with pytest.raises(TableError, match="leaves nothing to predict: 22 usable rows"):
        predict.score(tmp_path / "c.csv", 22)


def test_curves_that_no_point_was_left_for_are_reported_apart(tmp_path):
    rows = [
        ["all_reduce", n, 1, 2**k, 50 + 2**k / 1e5, "A100"]
        for n in (2, 4)
        for k in (16, 20, 24, 28)
    ]
    header = ["collective", "ranks", "nodes", "size_bytes", "time_us", "gpu"]
    path = _write(tmp_path / "c.csv", header, rows)
    three = predict.score(path, 3).stats
    assert (three["inside"]["rows"], three["unseen"]["rows"]) == (1, 4)
    none = predict.score(path, 0).stats
    assert (none["calibrated"], none["unseen"]["rows"], none["basis"]) == (0, 8, "unseen")


def test_a_time_that_its_bandwidth_contradicts_is_refused(tmp_path):
    header = ["collective", "ranks", "nodes", "size_bytes", "time_us", "algbw_GBps"]
    rows = [["all_reduce", 8, 1, 10**k, 10**k / 1e5, 100e-3] for k in (6, 7, 8, 9)]
    path = _write(tmp_path / "c.csv", header, rows)
    with pytest.raises(TableError, match="is time_us in microseconds"):
        predict.score(_scaled(path, "time_us", 1e-3))


def test_ddp_tables_are_predicted_from_one_gpus_step(tmp_path):
    rows = []
    for model, t in (("a", 0.1), ("b", 0.2), ("c", 0.4)):
        rows.append([model, "no ddp", 1, 32, t, "single"])
        for n in (2, 4, 8):
            rows.append([model, f"1M/{n}G", n, 32, f"{t * (1.03 + 0.06 * (n - 1) / n):.5f}", "DDP"])
    header = ["model", "config", "gpus", "mbs", "iter_s_p50", "strategy"]
    stats = predict.score(_write(tmp_path / "d.csv", header, rows), 4).stats
    assert stats["time"]["median_error"] < 0.02
    assert stats["given"] == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ("a,b\n", "no rows"),
        ("a,b\n1\n", "line 2: 1 cells, the header has 2"),
        ("a,a\n1,2\n", "columns named twice: a"),
        ("a,b\n1,2\n", "not a table this command knows"),
        ("collective,ranks,nodes,size_bytes,time_us\nall_reduce,8,1,big,3\n", "line 2, column"),
        ("collective,ranks,nodes,size_bytes,time_us\nall_redeuce,8,1,1,3\n", "line 2: unknown"),
        ("collective,ranks,nodes,size_bytes,time_us\nall_reduce,8,1,1,3\n", "nothing to predict"),
        ("collective,ranks,nodes,size_bytes,time_us\nall_reduce,8,1,inf,3\n", "'inf' is beyond"),
        ("collective,nodes,size_bytes,time_us\nall_reduce,1,1,3\n", "lacks the columns ranks"),
    ],
)
def test_a_malformed_file_gives_one_clear_line_and_exit_code_2(tmp_path, capsys, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    assert main([str(path)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert message in shown.err


def test_binary_missing_and_greedy_requests_are_refused(tmp_path, capsys):
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00\x01")
    assert main([str(tmp_path / "x.csv")]) == 2
    assert main([str(tmp_path / "none.csv")]) == 2
    assert main([str(_iterations(tmp_path, 8)), "--calibrate-rows", "8"]) == 2
    assert "leaves nothing to predict" in capsys.readouterr().err


def test_rows_that_contradict_themselves_are_skipped_and_counted(tmp_path):
    path = _iterations(tmp_path, 10)
    lines = path.read_text().splitlines()
    cells = lines[1].split(",")
    lines[1] = ",".join(["999", *cells[1:]])
    path.write_text("\n".join(lines) + "\n")
    data = runs(read(path))
    assert len(data) == 9
    assert data.skipped == {"dp x tp x pp is not the number of GPUs": 1}
    path.write_text("\n".join([lines[0], lines[1]]) + "\n")
    with pytest.raises(TableError, match="no usable row"):
        runs(read(path))


def test_columns_in_another_order_and_further_ones_change_nothing(tmp_path):
    path = _iterations(tmp_path, 16)
    rows = list(csv.reader(path.read_text().splitlines()))
    as_given = predict.score(path, 6).stats
    _write(path, ["note", *reversed(rows[0])], [["x", *reversed(r)] for r in rows[1:]])
    assert predict.score(path, 6).stats == as_given


def _scaled(path, column, factor):
    header, *rows = csv.reader(path.read_text().splitlines())
    i = header.index(column)
    return _write(path, header, [[*r[:i], float(r[i]) * factor, *r[i + 1 :]] for r in rows])


@pytest.mark.parametrize(("factor", "word"), [(1e-3, "faster than"), (1e3, "of their GPUs' peak")])
def test_times_in_another_unit_are_refused_and_the_unit_named(tmp_path, factor, word):
    path = _scaled(_iterations(tmp_path, 16), "iter_ms", factor)
    with pytest.raises(TableError, match=f"{word}.*is iter_ms in milliseconds"):
        predict.score(path, 6)


def test_memory_readings_in_another_unit_are_refused(tmp_path):
    with pytest.raises(TableError, match="is mem_gb in GB"):
        predict.score(_layouts(tmp_path, memory_unit=1e-3))


def test_an_unknown_gpu_is_named_and_its_rows_are_still_predicted(tmp_path):
    path = _iterations(tmp_path, 40)
    path.write_text(path.read_text().replace("A100", "Zorg-9"))
    found = predict.score(path, 20)
    assert found.stats["time"]["median_error"] < 0.1
    assert "unknown GPU 'Zorg-9'" in repr(found)


def test_statistics_have_known_answers():
    assert errors(np.array([1.1, 0.9]), np.ones(2))["median_error"] == pytest.approx(0.1)
    assert rank_correlation(np.array([1, 2, 3]), np.array([10, 20, 30])) == 1
    assert auc(np.array([1, 2, 3, 4]), np.array([False, False, True, True])) == 1
    assert auc(np.ones(4), np.array([False, True, False, True])) == 0.5
    found = regret(np.array(["g"] * 4), np.array([2, 1, 3, 4.0]), np.array([1, 2, 3, 4.0]))
    assert (found["pick_median"], found["top3_median"]) == (2, 1)


@pytest.mark.parametrize("name", ["vtrain_a100_single", "vtrain_a100_multi"])
def test_large_published_tables_meet_the_aims(name, request):
    folder = request.config.getoption("--published", default=None)
    if not folder:
        pytest.skip("pass --published=FOLDER with the large published tables to score them")
    stats = predict.score(f"{folder}/{name}.csv", 50).stats
    assert stats["time"]["median_error"] < (0.06 if "single" in name else 0.10)
