"""Reading records: comparing runs, exporting them, and holding the machine's clock."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pardemo import cli, records
from pardemo.parameters import Refused
from pardemo.records import Sample, Store


def times(median_s: float, seed: int, noise: float = 0.01) -> list[Sample]:
    """Eight rounds of five samples around `median_s`, with one shared factor per round."""
    draw = np.random.default_rng(seed)
    return [
        Sample(number, 0, i, float(median_s * weather * np.exp(draw.normal(0, noise / 3))))
        for number in range(8)
        for weather in [np.exp(draw.normal(0, noise))]
        for i in range(5)
    ]


def record(store: Store, cases: dict[str, list[Sample]], **values: object) -> records.RunRow:
    with store.begin("strategies") as run:
        for name, samples in cases.items():
            run.add(name, {"ranks": 2, "threads": 1, "status": "ok", **values}, samples)
    return store.find(run.id)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return records.open(tmp_path / "pardemo.sqlite")


def test_a_planted_slowdown_is_slower_and_an_equal_cell_is_the_same(store: Store) -> None:
    a = record(store, {"ddp": times(0.1, 0), "fsdp": times(0.2, 1), "gone": times(1, 2)})
    b = record(store, {"ddp": times(0.12, 3), "fsdp": times(0.2, 4), "new": times(1, 5)})
    found = records.compare(store, a, b)
    verdicts = {cell.name: cell.ratio.verdict for cell in found.cells}
    assert verdicts == {"ddp": "slower", "fsdp": "the same"}
    assert (found.only_a, found.only_b) == (("gone",), ("new",))
    assert [cell.name for cell in found.regressions(0.05)] == ["ddp"]
    assert found.regressions(0.5) == []
    assert "two sessions" in repr(found)


def test_cells_that_all_moved_alike_point_to_the_machine_and_one_alone_does_not(
    store: Store,
) -> None:
    usual = {"ddp": 0.1, "fsdp": 0.2, "tensor": 0.15}
    a = record(store, {name: times(s, i) for i, (name, s) in enumerate(usual.items())})
    b = record(store, {name: times(1.2 * s, 5 + i) for i, (name, s) in enumerate(usual.items())})
    found = records.compare(store, a, b)
    assert found.common == pytest.approx(1.2, rel=0.02)
    assert "all 3 cells moved alike, by a factor of 1.2" in repr(found)
    usual["ddp"] *= 1.2
    c = record(store, {name: times(s, 8 + i) for i, (name, s) in enumerate(usual.items())})
    found = records.compare(store, a, c)
    assert found.common is None
    assert [cell.name for cell in found.regressions(0.05)] == ["ddp"]


def test_a_comparison_that_judged_nothing_does_not_look_passed(store: Store) -> None:
    a, b = record(store, {"ddp": times(0.1, 0)}), record(store, {"fsdp": times(0.1, 0)})
    assert "nothing was judged" in repr(records.compare(store, a, b))
    here = str(store.path.parent)
    assert cli.main(["compare", a.id, b.id, "--results", here]) == 2
    assert cli.main(["compare", a.id, a.id, "--results", here]) == 0


def test_a_contaminated_cell_is_never_a_regression(store: Store) -> None:
    a = record(store, {"ddp": times(0.1, 0)})
    b = record(store, {"ddp": times(0.2, 1)}, status="contaminated", warnings=["load 9"])
    found = records.compare(store, a, b)
    assert found.cells[0].ratio.verdict == "cannot tell"
    assert "load 9" in repr(found)
    assert found.regressions(0.0) == []


def test_what_others_took_of_the_cores_is_remembered_and_refuses_the_ratio(store: Store) -> None:
    a = record(store, {"ddp": times(0.1, 0)}, taken=0.02)
    b = record(store, {"ddp": times(0.2, 1)}, taken=0.4)
    found = records.compare(store, a, b)
    (case,) = store.cases(b.id)
    timing = records.timing(store, case)
    assert timing is not None
    assert timing.taken == 0.4
    assert found.cells[0].ratio.verdict == "cannot tell"


def test_warm_up_samples_are_kept_but_not_compared(store: Store) -> None:
    warm = [Sample(0, 0, 0, 9.0, "warmup")]
    run = record(store, {"ddp": warm + times(0.1, 0)})
    (case,) = store.cases(run.id)
    timing = records.timing(store, case)
    assert timing is not None
    assert timing.p90_s < 1
    assert len(store.samples(run.id, "ddp")) == 41


def test_runs_are_found_by_the_beginning_of_their_id_or_from_the_end(store: Store) -> None:
    first, second = record(store, {}), record(store, {})
    assert store.find("last") == second
    assert store.find("last-1") == first
    assert store.find(first.id[:-1]).id == first.id
    with pytest.raises(Refused, match="there are 2 runs"):
        store.find("last-7")
    with pytest.raises(Refused, match="0 runs begin with"):
        store.find("1999")


def test_exports_hold_every_case_and_every_sample(store: Store, tmp_path: Path) -> None:
    record(store, {"ddp": times(0.1, 0), "fsdp": times(0.2, 1)}, anatomy={"compute_s": 1})
    assert records.export(store, tmp_path / "cases.jsonl") == 2
    assert records.export(store, tmp_path / "samples.csv", raw=True) == 80
    lines = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    assert [line["case"] for line in lines] == ["ddp", "fsdp"]
    assert lines[0]["anatomy"] == {"compute_s": 1}
    with (tmp_path / "samples.csv").open() as file:
        assert sum(float(row["seconds"]) > 0 for row in csv.DictReader(file)) == 80
    assert (tmp_path / "cases.jsonl").stat().st_mode & 0o077 == 0
    with pytest.raises(Refused, match="ends in none of"):
        records.export(store, tmp_path / "cases.xls")


def test_parquet_is_written_where_pyarrow_is_and_refused_in_words_elsewhere(
    store: Store, tmp_path: Path
) -> None:
    record(store, {"ddp": times(0.1, 0)})
    if importlib.util.find_spec("pyarrow"):
        assert records.export(store, tmp_path / "cases.parquet") == 1
    else:
        with pytest.raises(Refused, match="pip install pyarrow"):
            records.export(store, tmp_path / "cases.parquet")
        assert list(tmp_path.glob("*parquet*")) == []


HOLD = """
import sys, pathlib
from pardemo import cli, records
with records.timing_lock("scaling", path=pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_timed_run_is_told_who_holds_the_clock(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "timing.lock"
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert first.stdout is not None
    assert first.stdin is not None
    assert first.stdout.readline() == b"held\n"
    said = f"process {first.pid} .* is timing scaling"
    with pytest.raises(records.Busy, match=said), records.timing_lock("mine", path=path):
        raise AssertionError("two runs are timing at once")
    assert "scaling" in records.holder(path)
    first.kill()
    first.wait(timeout=30)
    with records.timing_lock("mine", path=path):
        assert "is timing mine" in records.holder(path)
    assert records.holder(path) == ""
