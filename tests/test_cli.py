"""The command line: every verb answers; bad input is one line and exit code 2, no traceback."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pardemo import cli, lab, notebooks, records, stop, versions
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


BAD = [
    ("", "arguments are required: VERB"),
    ("mesure", "invalid choice: 'mesure'"),
    ("bench stategies", "did you mean 'strategies'"),
    ("bench strategies -p modle mlp", "did you mean 'model'"),
    ("bench strategies -p model mpl", "did you mean 'mlp'"),
    ("bench strategies -p strategies ddp,fdsp", "did you mean 'fsdp'"),
    ("bench strategies -p rounds 0", "rounds must be at least 1, not 0"),
    ("bench strategies -p seconds -0.5", "seconds must be at least 0, not -0.5"),
    ("bench strategies -p nprocs -1", "nprocs must be at least 0, not -1"),
    ("bench strategies -p rounds many", "parameter rounds takes int"),
    ("bench strategies -p rounds 9999999999999999999", "parameter rounds takes int"),
    ("bench strategies -p seconds nan", "not 'nan'"),
    ("bench strategies -p rounds 8 -p rounds 9", "given twice"),
    ("bench strategies -p rounds", "-p: expected 2 arguments; see `pardemo bench --help`"),
    ("bench strategies --sweep x.yml", "not both"),
    ("bench --sweep missing.yml", "cannot read missing.yml"),
    ("bench ../notebooks/04_ddp", "no notebook"),
    ("notebooks 99_nothing", "no notebook '99_nothing'"),
    ("notebooks --mok", "unrecognized arguments: --mok"),
    ("records", "no records in results"),
    ("records --results /dev/null", "no records in /dev/null"),
    ("records --results ", "argument --results: '' names no folder"),
    ("compare last-1 last", "no records in results"),
    ("compare a b --threshold nan", "nan is not a finite number"),
    ("compare a", "the following arguments are required: B"),
    ("lab --port eighty", "invalid int value: 'eighty'"),
    ("lab --port 80", "--port is 1024 to 65535, not 80"),
    ("nodes up --count 99", "1 to 32 nodes, not 99"),
    ("nodes up --rate fast", "'fast'"),
    ("nodes run 0", "say what to run"),
    ("nodes sideways", "invalid choice: 'sideways'"),
    ("doctor --nodes here", "host:port"),
    ("doctor --this 3", "--this"),
    ("doctor --timeout-s inf", "inf is not a finite number"),
    ("cluster template slrum", "did you mean 'slurm'"),
    ("cluster template slurm --name $(id)", "name must be"),
    ("run --folder ", "--folder: '' names no folder"),
    ("run --folder x --strategy dpd", "no strategy is called 'dpd'"),
    ("run --folder x --workload mpl", "did you mean 'mlp'"),
    ("run --folder x --workload os:nothing", "'os:nothing' cannot be loaded"),
    ("run --folder x --workload os.path:", "is not package.module:name"),
    ("run --folder x --steps 0", "steps must be at least 1"),
    ("plan --model gtp2", "unknown model 'gtp2'"),
    ("plan --model gpt2 --ranks many", "invalid int value: 'many'; see `pardemo plan --help`"),
    ("plan --model gpt2 --ranks -4", "--ranks must be at least 1"),
    ("plan --model gpt2 --cluster nowhere", "no profile nowhere"),
    ("plan", "arguments are required: --model"),
    ("score /no/such/file.csv", "cannot be read"),
    ("score --most-nodes inf x.csv", "argument --most-nodes: inf is not a finite number"),
    ("score", "arguments are required: file"),
]


@pytest.mark.parametrize(("line", "said"), BAD, ids=[line or "nothing" for line, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_two(
    line: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run(*line.split(" ") if line else ()) == 2
    told = capsys.readouterr().err
    assert said in told
    assert len(told.strip().splitlines()) == 1
    assert "Traceback" not in told
    assert list(tmp_path.iterdir()) == [], "nothing was written"


@pytest.mark.parametrize("line", ["records", "compare a b", "bench launching"])
def test_results_where_no_file_can_be_are_refused_in_one_line(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pardemo.sqlite").mkdir()
    assert run(*line.split(), "--results", str(tmp_path)) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert "pardemo.sqlite: Is a directory; choose another results folder" in told[-1]
    assert all(line.startswith("WARNING") for line in told[:-1]), "of the machine card"


@pytest.mark.parametrize("line", ["--debug records", "records --debug", "score --debug /no/file"])
def test_debug_shows_the_rest_wherever_it_stands(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no records|cannot be read"):
        run(*line.split())


def test_debug_of_another_program_is_left_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("cluster", "template", "torchrun", "--program", "train.py", "--debug") == 0
    assert "train.py --debug" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (ValueError("wrong"), "wrong", 2),
        (RecursionError("depth"), "the input is nested too deeply", 2),
        (IsADirectoryError(21, "Is a directory", "x"), "'x': Is a directory; check that path", 2),
        (OSError(28, "No space left"), "[Errno 28] No space left", 1),
        (RuntimeError("a\nb\nException raised from c10"), "a b", 1),
        (MemoryError(), "out of memory; choose something smaller", 1),
        (TypeError("slip"), "a fault of pardemo itself, TypeError: slip; --debug shows", 1),
        (ValueError(), "ValueError without a message", 2),
    ],
)
def test_every_error_is_one_line_that_says_whose_it_is(
    error: Exception, said: str, code: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def broken(_: object) -> int:
        raise error

    monkeypatch.setattr(cli, "_machine", broken)
    assert run("machine") == code
    told = capsys.readouterr().err
    assert told.startswith(f"pardemo: {said}")
    assert len(told.splitlines()) == 1


def test_a_reader_that_leaves_early_is_no_error() -> None:
    shell = subprocess.Popen(
        [sys.executable, "-m", "pardemo", "plan", "--model", "gpt2", "--rows", "2000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert shell.stdout is not None
    assert shell.stderr is not None
    fcntl.fcntl(shell.stdout, fcntl.F_SETPIPE_SZ, 4096)  # less than all: what is left must wait
    shell.stdout.readline()
    shell.stdout.close()
    assert shell.stderr.read() == ""
    assert shell.wait(timeout=60) == 141


@pytest.mark.parametrize("start", ["-m pardemo machine", "-c import(pardemo)"])
def test_a_torch_that_does_not_fit_is_refused_with_wanted_and_found(
    start: str, tmp_path: Path
) -> None:
    """Another torch's metadata lies first on the path; nothing is patched."""
    (tmp_path / "torch-2.9.1.dist-info").mkdir()
    (tmp_path / "torch-2.9.1.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.9.1\n")
    done = subprocess.run(
        [sys.executable, *start.replace("import(pardemo)", "import\tpardemo").split(" ")],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(notebooks.ROOT)])},
    )  # fmt: skip
    lines = done.stderr.splitlines()
    assert "pardemo needs torch >=2.13, found 2.9.1; `make setup`" in lines[-1]
    if start.startswith("-m"):
        assert (done.returncode, len(lines)) == (2, 1)
    else:
        assert lines[-1].startswith("ImportError: ")


def test_versions_that_fit_or_are_not_asked_for_are_let_through() -> None:
    assert versions.misfit("torch") == versions.misfit("jupyter-server") == ""
    assert versions.misfit("a-package-nobody-asks-for") == ""


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


def test_plan_and_score_are_predicts_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("plan", "--help")
    assert stop.value.code == 0
    assert "--model" in capsys.readouterr().out


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


def lose_the_first(number: signal.Signals) -> None:
    """As one that falls into a finaliser, whose errors Python drops."""
    with stop.stopped_by_signals(True):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            time.sleep(60)
        time.sleep(60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_that_was_lost_comes_again(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop, "AGAIN_S", 0.2)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as stopped:
        lose_the_first(number)
    assert stopped.value.args == (number,)
    assert signal.getsignal(number) == before
