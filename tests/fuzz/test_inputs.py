"""Whatever a file, a parameter or a command line holds, the answer is a value or one clear refusal.

Properties by hypothesis: a few examples in `make test`, the same ones each time; many new ones in
`make soak`. The last test shows that a reader which lets something else through is caught.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pardemo import bench, cli, lab, notebooks, sweep, workloads
from pardemo.cluster import holding, integrity, reach, train
from pardemo.cluster import nodes as node_room
from pardemo.parameters import Parameter, Refused, validate
from pardemo.predict import profile, runs, tables
from pardemo.predict.plan_cli import parse_model

SOAK = [pytest.mark.soak, pytest.mark.timeout(3600)]
QUICK, LONG = 40, 5000
often = pytest.mark.parametrize("examples", [QUICK, pytest.param(LONG, marks=SOAK)])

ODD = [
    "", " ", "nan", "-inf", "1e999", "0x10", "1_000", "١٢", "-1", "0", "9" * 30, "9" * 5000, "[",
    "(" * 300, "[" * 300, "None", "true", "{}", "\x00", "\n", "\ud800", "a" * 300, "../..", "é",
    "$(id)", "--debug", "-p", "[1, [2]]", "[None]", "{1: 2}", "1,2,", ",", "'", "*x", "&x [*x]",
    "2020-99-99", "!!python/name:os.system", "%", "\\", "~", "<<",
]  # fmt: skip
text = st.sampled_from(ODD) | st.text(max_size=40)
scalar = (
    st.none() | st.booleans() | st.integers() | st.floats() | text
    | st.sampled_from([10**400, -(10**400), 1e308, 5e-324])
)  # fmt: skip
plain = st.recursive(
    scalar, lambda x: st.lists(x, max_size=4) | st.dictionaries(text, x, max_size=4), max_leaves=8
)


def explore(examples: int, check: Callable[..., None], **strategies: st.SearchStrategy) -> None:
    """Run `check` on that many examples; few are the same each time, many are new."""
    how = settings(
        max_examples=examples, deadline=None, derandomize=examples == QUICK, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    how(given(**strategies)(check))()


def answers(errors: type[Exception], call: Callable[[], Any]) -> Any:
    """What `call` returns, or None for a refusal, which must be one line that is not empty."""
    try:
        return call()
    except errors as error:
        said = str(error)
        assert said.strip(), "a refusal without a word"
        assert len(said) < 3000, "nobody reads that"
        assert "\n" not in said.strip(), said
        return None


@often
@pytest.mark.parametrize("kind", ["int", "float", "bool", "str", "list[int]", "tuple[float, ...]",
                                  "str | None", "int | list[str]"])  # fmt: skip
def test_parameters(kind: str, examples: int) -> None:
    known = {"x": Parameter("x", kind, "1", "of things")}

    def check(name: Any, value: Any) -> None:
        found = answers(Refused, lambda: validate({name: value}, known, "here"))
        if found is not None:
            json.dumps(found["x"], allow_nan=False)  # plain, finite values
            if isinstance(found["x"], str):
                assert found["x"].isprintable()

    explore(examples, check, name=st.just("x") | text, value=plain)
    check(3, "1")


@functools.cache
def _strategies() -> dict[str, Parameter]:
    return notebooks.parameters(notebooks.find("strategies"))


@often
def test_sweep_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples: int) -> None:
    known = _strategies()
    monkeypatch.setattr(notebooks, "parameters", lambda path: known)
    file = tmp_path / "sweep.yml"
    pieces = st.sampled_from(
        ["benchmark: strategies\n", "grid:\n", "parameters:\n", "  nprocs: [1, 2]\n", "- ", ": ",
         "  rounds: 3\n", "  model: mlp\n", "{", "}", "[", "]", "&a ", "*a ", "!!set ", "? ", "|\n",
         "  rounds: [*a, *a]\n", "'", "#", "\t", "---\n", "grid: &a [*a]\n"]
    )  # fmt: skip
    whole = st.lists(pieces | text, max_size=12).map("".join)
    structured = st.dictionaries(
        st.sampled_from(["benchmark", "parameters", "grid"]) | text,
        st.just("strategies")
        | st.dictionaries(st.sampled_from(["rounds", "nprocs"]) | text, plain),
        max_size=4,
    ).map(lambda document: json.dumps(document))

    def check(content: str | bytes) -> None:
        data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        file.write_bytes(data)
        found = answers(Refused, lambda: sweep.load(file))
        assert found is None or 1 <= len(found.cases) <= sweep.MOST_CASES

    explore(examples, check, content=whole | structured | st.binary(max_size=60))
    lots = "a: &a [x,x]\n" + "".join(f"{k}: &{k} [*{chr(ord(k) - 1)}]\n" for k in "bcdefgh")
    for content in ("[" * 20_000, "x" * 200_000, lots, "benchmark: 2020-99-99", "? [1]\n: 2"):
        check(content)


@often
def test_profiles(tmp_path: Path, examples: int) -> None:
    file = tmp_path / "profile.json"
    shipped = profile.load(profile.shipped()[0]).as_dict()

    def check(key: str, value: Any, inner: str, raw: bytes) -> None:
        document = copy.deepcopy(shipped)
        if isinstance(document.get(key), dict) and inner:
            document[key][inner] = value
        elif isinstance(document.get(key), list) and document[key] and inner:
            document[key][0][inner] = value
        else:
            document[key] = value
        for content in (json.dumps(document).encode(), json.dumps(value).encode(), raw):
            file.write_bytes(content)
            found = answers(profile.ProfileError, lambda: profile.load(file))
            if found is not None:
                answers(ValueError, found.curves)
                repr(found)

    rows = ["collective", "ranks", "nodes", "size_bytes", "time_s", "kind", "flops", "hidden_share"]
    explore(
        examples, check, key=st.sampled_from(sorted(shipped)) | text, value=plain,
        inner=st.sampled_from(["", *rows]) | text, raw=st.binary(max_size=80),
    )  # fmt: skip
    check("calibrated", None, "\n", b"")  # a name that is a line of its own
    for raw in (b"[" * 50_000, b'{"a":' * 50_000, b"\xff\xfe"):
        check("name", "x", "", raw)


HEADERS = [",".join([*needed, *(group[0] for group in groups)])
           for needed, groups in tables.KINDS.values()]  # fmt: skip


@often
def test_score_tables(tmp_path: Path, examples: int) -> None:
    file = tmp_path / "table.csv"
    cell = st.sampled_from(
        ["1", "8", "1024", "0", "-1", "nan", "inf", "1e300", "", "x", "A100", "ok"]
    )
    cell |= text

    def check(header: str, cells: list[list[str]], raw: bytes) -> None:
        width = header.count(",") + 1
        lines = [header, *(",".join((row * width)[:width]) for row in cells)]
        for content in ("\n".join(lines).encode("utf-8", "surrogatepass"), raw):
            file.write_bytes(content)
            table = answers(tables.TableError, lambda: tables.read(file))
            if table is not None and table.kind in ("iterations", "layouts", "training"):
                with np.errstate(all="ignore"):
                    answers(ValueError, functools.partial(runs.runs, table))

    explore(
        examples, check, header=st.sampled_from(HEADERS) | text,
        cells=st.lists(st.lists(cell, min_size=1, max_size=16), max_size=4),
        raw=st.binary(max_size=60),
    )  # fmt: skip


@often
def test_user_model_paths_and_names(examples: int) -> None:
    part = st.sampled_from(
        ["os", "json", "os.path", "pardemo", "no_such_module", "antigravity_", ""]
    )
    name = st.sampled_from(["path", "loads", "sep", "nothing", "", "__name__", "sys"])
    paths = st.builds(lambda a, b: f"{a}:{b}", part | text, name | text)

    def check(path: str) -> None:
        if not path.startswith(("antigravity:", "this:")):
            answers(ValueError, lambda: workloads.workload(path))
        answers(ValueError, lambda: parse_model(path))
        answers(ValueError, lambda: reach.parse(path.encode("ascii", "ignore").decode()))

    explore(examples, check, path=paths | text)
    check("9" * 5000)


@often
def test_manifests_of_checkpoints(tmp_path: Path, examples: int) -> None:
    folder = tmp_path / "step-00000001"
    folder.mkdir(mode=0o700)
    (folder / "data").write_bytes(b"content")
    (folder / "data").chmod(0o600)
    files = {"data": integrity.digest(folder / "data")}
    good = {"format": integrity.FORMAT, "step": 1, "files": files}
    manifest = folder / integrity.MANIFEST

    def check(key: str, value: Any, raw: bytes) -> None:
        sealed, odd = integrity.seal(good | {key: value}), json.dumps(value)
        for content in (sealed.encode(), odd.encode(), raw):
            manifest.write_bytes(content)
            manifest.chmod(0o600)

            def read() -> dict[str, Any]:
                found = integrity.read_manifest(folder)
                integrity.check_files(folder, found, ["data"])
                return found

            found = answers(integrity.Damaged, read)
            assert (
                found is None or found["files"]["data"]["sha256"] == good["files"]["data"]["sha256"]
            )

    explore(
        examples, check, key=st.sampled_from(["files", "format", "step"]) | text, value=plain,
        raw=st.binary(max_size=40),
    )  # fmt: skip


VERBS = ["bench", "records", "compare", "machine", "notebooks", "lab", "nodes", "run", "cluster",
         "doctor", "plan", "score"]  # fmt: skip
WORDS = [
    *VERBS, "up", "down", "status", "link", "template", "slurm", "kubernetes", "last", "last-1",
    "strategies", "04_ddp", "--sweep", "-p", "rounds", "--results", "--export", "--samples",
    "--threshold", "--port", "--count", "--rate", "--nodes", "--this", "--folder", "--workload",
    "--steps", "--model", "gpt2", "--ranks", "--cluster", "h100-dgx", "--rows", "--json", "1gbit",
    "--memory-gb", "--parameters", "--mock", "--debug", "--", "/dev/null", "/", "x.csv",
    "--latency-ms", "--global-batch", "--calibrate-rows", "--timeout-s", "--gpus-per-node",
]  # fmt: skip


@often
def test_command_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    examples: int,
) -> None:  # fmt: skip
    """What would run for long is left out; all that checks what was asked is there."""
    monkeypatch.chdir(tmp_path)
    known = _strategies()
    monkeypatch.setattr(notebooks, "parameters", lambda path: known)
    monkeypatch.setattr(bench, "run", lambda *_: 0)
    monkeypatch.setattr(notebooks, "refresh", lambda *_, **__: 0.0)
    monkeypatch.setattr(lab.subprocess, "Popen", _nothing)
    monkeypatch.setattr(train, "run", lambda job: job.check())
    monkeypatch.setattr(node_room.Nodes, "__init__", _nothing)
    monkeypatch.setattr(holding, "load", lambda: None)
    monkeypatch.setattr(reach, "examine", lambda *_: iter(()))

    def check(words: list[str]) -> None:
        words = [word.replace("\x00", "") for word in words if word != "--debug"]
        try:
            code = cli.main(words)
        except SystemExit as stop:
            code = stop.code
            assert code == 0, "only --help ends by itself"
        told = capsys.readouterr().err
        assert code in (0, 1, 2), (words, told)
        assert "Traceback" not in told, (words, told)
        assert "a fault of pardemo" not in told, (words, told)
        if code == 2:
            last = [line for line in told.splitlines() if not line.startswith("note: ")]
            assert len(last) == 1, (words, told)

    line = st.lists(st.sampled_from(WORDS) | text, max_size=6)
    begun = st.builds(lambda verb, rest: [verb, *rest], st.sampled_from(VERBS), line)
    explore(examples, check, words=begun | line)
    check(["bench", "bench", "--export", "\ud800"])  # half a character


def _nothing(*_: object, **__: object) -> Any:
    raise Refused("left out here")


def test_a_reader_that_lets_another_error_through_is_caught() -> None:
    """Broken on purpose: a converter that is a bare int() meets what the real one refuses."""

    def check(value: Any) -> None:
        answers(Refused, lambda: int(value))

    with pytest.raises((ValueError, TypeError, OverflowError)):
        explore(QUICK, check, value=plain)
