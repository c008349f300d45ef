"""The command line: every verb answers; bad input is one line and exit code 2, no traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pardemo import cli, lab, notebooks, records
from pardemo.records import Sample


def run(*words: str) -> int:
    return cli.main(list(words))


def fill(results: Path, *medians: float) -> None:
    """Runs with one case "ddp" each, of eight steady rounds."""
    store = records.open(results / "pardemo.sqlite")
    for number, median in enumerate(medians):
        draw = np.random.default_rng(number)
        times = [
            Sample(r, 0, i, float(median * np.exp(draw.normal(0, 0.004))))
            for r in range(8)
            for i in range(4)
        ]
        with store.begin("strategies", {"workload": "mlp"}) as made:
            made.add("ddp", {"ranks": 2, "threads": 1, "status": "ok"}, times)
    store.close()


def test_python_m_pardemo_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pardemo", "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    for verb in ("bench", "records", "compare", "machine", "notebooks", "lab", "plan", "score"):
        assert verb in done.stdout


def test_machine_prints_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("machine") == 0
    assert "cores" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("bench", "stategies"), "did you mean 'strategies'"),
        (("bench", "strategies", "-p", "modle", "mlp"), "did you mean 'model'"),
        (("bench", "strategies", "-p", "rounds", "many"), "parameter rounds takes int"),
        (("bench", "strategies", "-p", "rounds", "8", "-p", "rounds", "9"), "given twice"),
        (("bench", "strategies", "--sweep", "x.yml"), "not both"),
        (("bench", "--sweep", "missing.yml"), "cannot read missing.yml"),
        (("notebooks", "99_nothing"), "no notebook '99_nothing'"),
        (("records",), "no records in results"),
        (("compare", "last-1", "last"), "no records in results"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    told = capsys.readouterr().err
    assert said in told
    assert len(told.strip().splitlines()) == 1
    assert "Traceback" not in told
    assert list(tmp_path.iterdir()) == [], "nothing was written"


def test_debug_shows_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no records"):
        run("--debug", "records")


def test_parameters_of_a_benchmark_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "strategies", "--parameters") == 0
    out = capsys.readouterr().out
    for name, parameter in notebooks.parameters(notebooks.find("strategies")).items():
        assert name in out
        assert parameter.help in out


def test_records_lists_runs_cases_and_exports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path, 0.1)
    assert run("records", "--results", str(tmp_path)) == 0
    assert "strategies  done" in capsys.readouterr().out
    assert run("records", "last", "--results", str(tmp_path)) == 0
    assert "8 rounds x 4, 2 ranks x 1 thread" in capsys.readouterr().out
    target = tmp_path / "out.jsonl"
    assert run("records", "--results", str(tmp_path), "--export", str(target), "--samples") == 0
    assert len(target.read_text().splitlines()) == 32


def test_compare_exits_one_on_a_regression_beyond_the_threshold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path, 0.1, 0.1001, 0.12)
    where = ("--results", str(tmp_path))
    assert run("compare", "last-2", "last-1", *where) == 0
    assert "ddp: the same" in capsys.readouterr().out
    assert run("compare", "last-1", "last", *where) == 1
    out = capsys.readouterr().out
    assert "ddp: slower" in out
    assert "REGRESSION ddp: slower by more than 5%" in out
    assert run("compare", "last-1", "last", "--threshold", "0.5", *where) == 0
    assert run("compare", "last", "last-1", *where) == 0
    assert "ddp: faster" in capsys.readouterr().out


def test_plan_and_score_are_predicts_own_and_keep_the_one_line_rule(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        run("plan", "--help")
    assert stop.value.code == 0
    assert "--model" in capsys.readouterr().out
    assert run("score", "/no/such/file.csv") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_lab_listens_on_loopback_keeps_its_token_and_opens_lesson_00(tmp_path: Path) -> None:
    command = lab.command(port=8899, browser=False)
    assert "--ServerApp.ip=127.0.0.1" in command
    assert "--ServerApp.port=8899" in command
    assert not any("token" in word or "password" in word for word in command)
    assert f"--LabApp.default_url=/lab/tree/{lab.FIRST}" in command
    surroundings = lab.environment(tmp_path)
    config = Path(surroundings["IPYTHONDIR"], "profile_default", "ipython_kernel_config.py")
    assert "log_level = 40" in config.read_text()
    news = Path(surroundings["JUPYTERLAB_SETTINGS_DIR"]).rglob("notification.jupyterlab-settings")
    assert '"fetchNews": "false"' in next(news).read_text()
