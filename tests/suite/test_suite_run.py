"""The whole suite on a small model: proven, predicted before measured, recorded; and refusals."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from unittest import mock

import pytest

from pardemo import check, records, suite
from pardemo.check.verdict import Verdict
from pardemo.launch import launch
from pardemo.machine import machine
from pardemo.predict import load
from pardemo.strategies import StrategyError
from pardemo.suite import ALL, ONE, inside
from pardemo.workloads import workload

PROFILE = load({
    "schema": "pardemo-profile/1", "name": "made-up", "date": "2026-01-01", "source": "a test",
    "per_node": 2, "memory_bytes": 1e9, "peak_flops": {"float32": 1e10},
    "collectives": [
        {"collective": kind, "ranks": 2, "size_bytes": size, "time_s": 3e-4 + size / 1e9}
        for kind in ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "send")
        for size in (1e3, 1e5, 1e7)
    ],
})  # fmt: skip


def test_every_row_is_proven_predicted_measured_and_recorded(tmp_path: Path) -> None:
    said: list[str] = []
    table = suite.run(
        "mlp", ["ddp", "model_parallel", "data_parallel", "expert", "dp_tp"], nprocs=2,
        batch_size=16, rounds=6, seconds=2.0, profile=PROFILE, anatomy=False,
        record=tmp_path / "pardemo.sqlite", say=said.append,
    )  # fmt: skip
    timed = {row.name for row in table.timed}
    assert timed - {ALL} == {ONE, "ddp", "model_parallel", "data_parallel"}
    assert set(table.untimed()) == {
        table["expert"].reason, "on 2 ranks one of its axes has degree 1: see its other part"
    }  # fmt: skip
    for name in ("ddp", "model_parallel"):
        row = table[name]
        assert row.sent_bytes == pytest.approx(row.formula_bytes, abs=0.01)
        assert row.predicted_s is not None
        assert row.memory["parameters_bytes"] > 0
        assert row.vs_one is not None
        assert "equal one process" in row.equal
    order = [next(i for i, line in enumerate(said) if word in line)
             for word in ("ddp: equal", "predicted: step of ddp", "measuring")]  # fmt: skip
    assert order == sorted(order), "a prediction must come before the measurement"
    store = records.open(tmp_path / "pardemo.sqlite")
    cases = {case.name: case for case in store.cases(table.run_id)}
    assert set(cases) == {row.name for row in table.rows}
    assert cases["expert"].status == "not timed"
    timing = records.timing(store, cases["ddp"])
    assert timing is not None
    assert timing.median_s == pytest.approx(table["ddp"].step_s)


def test_a_strategy_that_is_not_equal_to_one_process_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drifted = check.Verdict("not yet", "rank 1 drifted")
    monkeypatch.setattr(check, "strategy", lambda *_, **__: drifted)
    table = suite.run("mlp", ["ddp"], nprocs=2, batch_size=16, rounds=6, seconds=1.0,
                      profile=PROFILE, say=lambda text: None)  # fmt: skip
    assert table["ddp"].reason == "not equal to one process: rank 1 drifted"
    assert "ddp" not in [row.name for row in table.timed]


def test_unknown_names_are_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mlp"):
        suite.run("mlpp", say=lambda text: None)
    with pytest.raises(ValueError, match="did you mean 'ddp'"):
        suite.run("mlp", ["dpd"], say=lambda text: None)


def test_scaling_labels_more_ranks_than_devices_and_claims_nothing_from_them() -> None:
    found = suite.scale("mlp", "ddp", (1, 2, 64), "strong", batch_size=32, rounds=6, seconds=1.0,
                        say=lambda text: None)  # fmt: skip
    assert found.skipped[0].startswith("ddp on 64 ranks: a batch of 32")
    by_ranks = {(p.name, p.ranks): p for p in found.points}
    assert by_ranks["ddp", 2].batch_size == 32
    assert by_ranks[ONE, 1].speedup == 1.0
    assert "strong scaling of ddp" in repr(found)
    with pytest.raises(ValueError, match="kind is"):
        suite.scale("mlp", kind="sideways")  # type: ignore[arg-type]


def test_a_rank_does_not_wait_for_packages_that_only_the_kernel_needs() -> None:
    """Each would cost every new rank up to a second."""

    def loaded() -> list[str]:
        import sys

        import pardemo.suite  # and with it measure and predict

        assert pardemo.suite.run
        return [m for m in ("scipy", "pandas", "matplotlib", "sklearn") if m in sys.modules]

    assert launch(loaded, nprocs=1)[0] == []


def test_what_equals_one_process_but_refuses_the_real_batch_is_a_row_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = importlib.import_module("pardemo.suite.run")  # `suite.run` is the function
    plan = running.Plan(workload("mlp"), 8, 2, machine(), 1, 1.0, 1, 0.0, lambda line: None)
    refusing = mock.Mock(side_effect=StrategyError("a batch of 8 has no room"))
    monkeypatch.setattr(running, "_look", refusing)
    for status, looked, reason in (
        ("not yet", 0, "not equal to one process"),
        ("passed", 1, "cannot train this: a batch of 8 has no room"),
    ):
        said = Verdict(status, "text")
        monkeypatch.setattr(running.check, "strategy", mock.Mock(return_value=said))
        (candidate,) = running._candidates(plan, ["ddp"])
        assert not running._proven(plan, candidate, None)
        assert candidate.row.reason.startswith(reason)
        assert refusing.call_count == looked


def test_a_maker_survives_the_trip_to_a_rank() -> None:
    maker = inside.Maker("ddp", workload("mlp"), 8)
    assert pickle.loads(pickle.dumps(maker)).strategy == "ddp"
