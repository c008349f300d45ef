"""Small runs that calibrate and large ones that are predicted: named, told apart, or refused."""

from __future__ import annotations

import pytest

from pardemo import predict
from pardemo.predict.score_cli import main

SHAPE = {"model": "1B", "layers": 16, "hidden": 2048, "heads": 32, "ffn": 8192, "vocab": 131072}
LARGE = SHAPE | {"model": "8B", "layers": 32, "hidden": 4096, "ffn": 14336}
REST = {"seq": 4096, "grad_acc": 16, "pp": 1, "zero": 1, "status": "ok", "gpu": "H100"}


@pytest.fixture
def table(tmp_path):
    """Two models on 1 to 8 nodes, three microbatches each."""
    rows = []
    for shape, slower in ((SHAPE, 1.0), (LARGE, 7.0)):
        for nodes in (1, 2, 4, 8):
            for mbs in (1, 2, 4):
                size = {"nodes": nodes, "gpus": 8 * nodes, "dp": 8 * nodes, "tp": 1, "mbs": mbs}
                rows.append(shape | REST | size | {"step_s": 3.3 * mbs * slower * nodes**0.1})
    path = tmp_path / "small.csv"
    lines = [",".join(map(str, row.values())) for row in rows]
    path.write_text("\n".join([",".join(rows[0]), *lines]) + "\n", encoding="utf-8")
    return path


def test_only_small_runs_calibrate_and_far_ones_are_refused_or_called_extrapolated(table):
    found = predict.score(table, most_nodes=1)
    assert (found.stats["calibrated"], found.stats["refused"]) == (6, 6)  # 8 nodes: over 4 times
    assert found.stats["more_nodes"]["rows"] == found.stats["predicted"] == 12
    assert "extrapolated: time on more nodes than calibrated" in repr(found)


def test_larger_models_than_calibrated_are_told_apart(table):
    found = predict.score(table, 8, most_parameters=2e9)
    assert all("8B" in run.name for run in found.runs if run.ratio and run.line > 13)
    assert found.stats["larger_models"]["rows"] == 12
    assert found.stats["predicted"] == 24 - 8
    everything = predict.score(table, 20)
    assert everything.stats["predicted"] == 4


def test_every_predicted_run_has_its_line_its_name_and_its_ratio(table):
    found = predict.score(table, 12)
    lines = table.read_text().splitlines()
    for run in found.runs:
        cells = lines[run.line - 1].split(",")
        assert run.name.startswith(cells[0] + " on ")
        assert run.measured_s == pytest.approx(float(cells[-1]))
    worst = found.misses(1)[0]
    assert f"far off, line {worst.line}: {worst!r}" in repr(found)
    off = [max(run.ratio, 1 / run.ratio) for run in found.runs]
    assert max(worst.ratio, 1 / worst.ratio) == max(off)


def test_no_run_small_enough_is_one_line_and_exit_code_2(table, capsys):
    assert main([str(table), "--most-parameters", "1e6"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "no run on at most inf nodes of a model of at most 1e+06 parameters" in shown
