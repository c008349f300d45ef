"""Benchmarks from the command line: sweeps validated, resumed, never two at once, one report."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from pardemo import bench, explore, notebooks, page, records, sweep
from pardemo.parameters import Refused

PARAMETERS = """size: int = 3  # how large
names: str = "a"  # what
results: str = ""  # results file"""
BODY = """print("size", size)
assert size < 100, "too large\""""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with one tiny benchmark called `tiny`."""
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    monkeypatch.setattr(records.lock, "lock_path", lambda: tmp_path / "locks" / "timing.lock")
    monkeypatch.setattr(records, "holder", lambda: records.lock.holder(records.lock.lock_path()))
    code = nbformat.v4.new_code_cell
    cells = [
        nbformat.v4.new_markdown_cell("# Tiny\n\n**How large?**"),
        code(PARAMETERS),
        code(BODY),
    ]
    cells += [code("print('| table |')"), code("print('large enough')"), code("print('a doubt')")]
    for cell, tag in zip(cells[1:], ("parameters", "", "table", "verdict", "doubts"), strict=True):
        cell.metadata = {"tags": [tag] if tag else []}
    (tmp_path / "benchmarks").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "benchmarks" / "tiny.ipynb")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_sweep(root: Path, text: str) -> Path:
    path = root / "sweep.yml"
    path.write_text(text)
    return path


GRID = "benchmark: tiny\nparameters: {names: b}\ngrid: {size: [1, 2, 3]}\n"


def test_a_sweep_is_every_combination_in_order(root: Path) -> None:
    plan = sweep.load(write_sweep(root, GRID))
    assert [case.name for case in plan.cases] == [f"tiny names=b size={n}" for n in (1, 2, 3)]
    assert dict(plan.cases[0].given) == {"names": "b", "size": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("benchmrk: tiny", "did you mean 'benchmark'"),
        ("benchmark: tny", "did you mean 'tiny'"),
        ("benchmark: tiny\ngrid: {siz: [1]}", "did you mean 'size'"),
        ("benchmark: tiny\ngrid: {size: [many]}", "takes int"),
        ("benchmark: tiny\ngrid: {size: 3}", "must be a list"),
        ("benchmark: tiny\ngrid: {size: [1, 1]}", "same case twice"),
        ("benchmark: tiny\nparameters: {size: 1}\ngrid: {size: [2]}", "both"),
        ("benchmark: tiny\ngrid: {size: !!python/object/apply:os.system [ls]}", "plain values"),
        ("[1, 2]", "must be a mapping"),
        ("benchmark: [", "not a YAML file"),
        ("grid: {size: [1]}", "must name one of tiny"),
    ],
)
def test_a_bad_sweep_is_refused_before_anything_runs(root: Path, text: str, said: str) -> None:
    with pytest.raises(Refused, match=re.escape(said)):
        sweep.load(write_sweep(root, text))
    assert not (root / "results").exists()


def test_a_case_keeps_its_name_however_odd_its_values_are(root: Path) -> None:
    odd = sweep.Case("tiny", (("names", "a/b; rm -rf *" * 9),))
    assert odd.name == sweep.Case("tiny", (("names", "a/b; rm -rf *" * 9),)).name
    assert odd.name != sweep.Case("tiny", (("names", "a/c"),)).name
    assert records.store.allowed(odd.name) == odd.name


def test_a_run_prints_its_table_and_leaves_a_private_report(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = sweep.checked("tiny", {"size": "7"})
    assert bench.run([case], root / "results") == 0
    out = capsys.readouterr().out
    assert "| table |" in out
    assert "large enough" in out
    report = Path(re.search(r"report: (\S+)", out)[1])  # type: ignore[index]
    text = report.read_text()
    assert "size 7" in text
    assert "<li>a doubt</li>" in text
    assert "<li>large enough</li>" in text
    assert not re.search(r"(src|href)=\"(?!data:|#)", text), "something is loaded from outside"
    for file in [report, *report.parent.iterdir()]:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_failed_case_is_recorded_and_the_next_one_runs(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [sweep.checked("tiny", {"size": n}) for n in (500, 1)]
    assert bench.run(cases, root / "results") == 1
    said = capsys.readouterr()
    assert "AssertionError: too large" in said.err
    assert "| table |" in said.out
    store = records.open(root / "results" / "pardemo.sqlite")
    assert [case.status for case in store.cases(store.find("last").id)] == ["failed", "done"]


def test_an_interrupted_sweep_goes_on_with_what_is_missing(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = sweep.load(write_sweep(root, GRID))
    ran: list[str] = []
    real = bench._one

    def counted(case: sweep.Case, output: Path, results: Path) -> nbformat.NotebookNode:
        if len(ran) == 1 and "resumed" not in ran:
            raise KeyboardInterrupt
        ran.append(case.name)
        return real(case, output, results)

    monkeypatch.setattr(bench, "_one", counted)
    with pytest.raises(KeyboardInterrupt):
        bench.run(plan.cases, root / "results", plan)
    ran.append("resumed")
    assert bench.run(plan.cases, root / "results", plan) == 0
    assert ran == [plan.cases[0].name, "resumed", plan.cases[1].name, plan.cases[2].name]
    out = capsys.readouterr().out
    assert "1 of 3 cases are done" in out
    store = records.open(root / "results" / "pardemo.sqlite")
    assert [run.status for run in store.runs()] == ["done"]
    report = Path(re.findall(r"report: (\S+)", out)[-1]).read_text()
    assert [f"size {n}" in report for n in (1, 2, 3)] == [True] * 3


def test_a_benchmark_is_refused_while_another_one_is_timing(root: Path) -> None:
    with (
        records.timing_lock("scaling", path=records.lock.lock_path()),
        pytest.raises(records.Busy, match="is timing scaling"),
    ):
        bench.run([sweep.checked("tiny", {})], root / "results")
    assert not (root / "results").exists()


def test_a_page_needs_nothing_and_runs_nothing(tmp_path: Path) -> None:
    table = "<style>x</style><table><tr><td>1</td></tr></table><script>alert(1)</script>"
    output = nbformat.v4.new_output("display_data", data={"text/html": table})
    image = nbformat.v4.new_output(
        "display_data", data={"image/png": "aGk="}, metadata={"image/png": {"alt": 'a "bar"'}}
    )
    cell = nbformat.v4.new_code_cell("x", outputs=[output, image])
    session = page.Session(
        "A < B", "card & more", (("1. x", nbformat.v4.new_notebook(cells=[cell])),)
    )
    text = page.write(session, tmp_path / "report.html").read_text()
    assert "<script" not in text
    assert "<td>1</td>" in text
    assert "A &lt; B" in text
    assert 'alt="a &quot;bar&quot;"' in text
    assert "data:image/png;base64,aGk=" in text
    assert "Nothing was flagged" in text
    assert '<a href="#1-x">' in text
    assert 'id="1-x"' in text


def test_a_report_of_strategies_holds_the_explorers_and_still_needs_nothing(tmp_path: Path) -> None:
    pieces = bench._explorers(["strategies"])
    text = page.write(page.Session("A", "card", (), explorers=pieces), tmp_path / "r.html")
    whole = text.read_text()
    assert whole.count('class="pardemo-explorer"') == len(explore.names()) == len(pieces)
    assert not re.search(r'(?:src|href)="(?!#|data:)', whole)
    assert len(whole) < 1_000_000
    assert bench._explorers(["collectives"]) == ()


def test_a_benchmark_runs_under_papermills_own_command_too(root: Path) -> None:
    tiny, out = root / "benchmarks" / "tiny.ipynb", root / "out.ipynb"
    nbformat.write(notebooks.read(tiny), tiny)  # with a kernel's name, as every stored one has
    command = [sys.executable, "-m", "papermill"]
    told = subprocess.run(
        [*command, "--help-notebook", str(tiny)], capture_output=True, text=True, timeout=120
    )
    assert "size: int (default 3)" in told.stdout
    assert "how large" in told.stdout
    given = ["-p", "size", "7", "-y", "names: b", "--no-progress-bar"]
    done = subprocess.run(
        [*command, str(tiny), str(out), *given], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "size 7" in str(nbformat.read(out, 4))
