"""The `pardemo` command: a thin face over the package. Bad input is one line and exit code 2."""

from __future__ import annotations

import argparse
import errno
import importlib
import math
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .cluster.cli import add_parsers as add_cluster_verbs
from .launch import RankFailed
from .parameters import Refused, folder
from .stop import loaded, stopped_by_signals

if TYPE_CHECKING:
    from .records import Store

RESULTS = Path("results")
DELEGATED = {
    "plan": "predict step time, memory and layouts for a cluster",
    "score": "score the predictor on published runs",
}
# an OSError with one of these is about a path that the user named; others are the machine's
PATHS = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EEXIST,
    errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS, errno.EINVAL, errno.EILSEQ,
)  # fmt: skip
LONGEST = 2000  # characters of an error's line
CLEAN_UP = ("bench", "lab", "notebooks")  # verbs that have processes or files to end on SIGTERM


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line: what was wrong, and where help is."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise Refused(f"{message}; see `{self.prog} --help`")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """The arguments, every number that was given finite; a default may be "no limit"."""
        found = super().parse_args(args, namespace)
        for name, value in [(n, v) for n, v in vars(found).items() if v is not self.get_default(n)]:
            if isinstance(value, float) and not math.isfinite(value):
                self.error(f"argument --{name.replace('_', '-')}: {value} is not a finite number")
        return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 1 failed, 2 refused, 130 stopped).

    `--debug`, before or after the verb, lets an error through with its traceback.
    """
    words, debug = _without_debug(list(sys.argv[1:] if argv is None else argv))
    verb = words[0] if words else ""
    try:
        loaded()
        with warnings.catch_warnings(), stopped_by_signals(verb in CLEAN_UP):
            warnings.showwarning = _note
            code = _delegate(verb, words[1:]) if verb in DELEGATED else _run(words)
            sys.stdout.flush()  # a full disk or a closed pipe is found here, not at the exit
            return code
    except KeyboardInterrupt as stop:
        more = "; the same sweep goes on where it was" * (verb == "bench")
        print(f"stopped{more}", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except BrokenPipeError:  # `pardemo records | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            raise
        said, code = explain(error)
        print(f"pardemo{f' {verb}' if verb in DELEGATED else ''}: {said}", file=sys.stderr)
        return code


def command() -> int:
    """The `pardemo` command as a process of its own: `main`, and no traceback of a Ctrl-C that
    comes before it or after it."""
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said and done
    return code


def explain(error: Exception) -> tuple[str, int]:
    """What to print of an error, and the exit code: 2 for what the user gave, 1 for the rest.

    One line, except for a failed rank, whose own traceback is the answer."""
    if isinstance(error, RankFailed):
        return str(error), 1
    told = str(error).encode(errors="backslashreplace").decode()
    text = " ".join(told.split("\nException raised from", 1)[0].split())
    kind = type(error).__name__
    if isinstance(error, RecursionError):
        text, code = "the input is nested too deeply; make it flatter", 2
    elif isinstance(error, UnicodeError):
        text, code = f"text that is not UTF-8: {text}", 2
    elif isinstance(error, OSError) and error.errno in PATHS:
        where = "" if error.filename is None else f"{os.fspath(error.filename)!r}: "
        text, code = f"{where}{error.strerror}; check that path", 2
    elif isinstance(error, ValueError):
        code = 2
    elif isinstance(error, OSError | RuntimeError):
        code = 1
    elif isinstance(error, MemoryError):
        text, code = f"out of memory{': ' if text else ''}{text}; choose something smaller", 1
    else:
        text, code = f"a fault of pardemo itself, {kind}: {text}; --debug shows where", 1
    return (text or f"{kind} without a message; --debug shows where")[:LONGEST], code


def _without_debug(words: list[str]) -> tuple[list[str], bool]:
    """The words without `--debug`; what follows `--` or `--program` is another program's."""
    ends = [words.index(mark) for mark in ("--", "--program") if mark in words]
    mine, theirs = words[: min(ends, default=len(words))], words[min(ends, default=len(words)) :]
    return [word for word in mine if word != "--debug"] + theirs, "--debug" in mine


def _run(words: list[str]) -> int:
    arguments = parser().parse_args(words)
    return int(arguments.run(arguments) or 0)


def _note(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as one line, without the source line it came from."""
    print(f"note: {' '.join(str(message).split())}", file=sys.stderr)


def parser() -> Parser:
    """The command line: one verb each, every verb with its own --help."""
    top = Parser(prog="pardemo", description="Measure parallel training in PyTorch, then plan it.")
    top.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_bench(verbs)
    _add_records(verbs)
    verbs.add_parser("machine", help="print the machine card").set_defaults(run=_machine)
    books = verbs.add_parser("notebooks", help="re-execute notebooks in place")
    books.add_argument("names", nargs="*", help="04_ddp or 04; without a name: all of them")
    books.add_argument(
        "--mock", action="store_true", help="with the tests' small values; files stay as they are"
    )
    books.set_defaults(run=_notebooks)
    lab = verbs.add_parser("lab", help="open JupyterLab on the first lesson")
    lab.add_argument("--port", type=int, help="a fixed port; by default the first free one")
    lab.add_argument("--no-browser", action="store_true", help="print the address only")
    lab.set_defaults(run=_lab)
    add_cluster_verbs(verbs)
    for name, text in DELEGATED.items():
        verbs.add_parser(name, help=text, add_help=False)
    return top


def _add_bench(verbs: argparse._SubParsersAction) -> None:
    bench = verbs.add_parser("bench", help="run benchmark notebooks and write a report")
    bench.add_argument("names", nargs="*", metavar="NAME", help="strategies, scaling, ...")
    bench.add_argument(
        "-p", nargs=2, action="append", dest="pairs", metavar=("NAME", "VALUE"),
        help="a parameter of the notebook, for instance -p workload gpt-mini",
    )  # fmt: skip
    bench.add_argument("--sweep", type=Path, help="a YAML file: benchmark, parameters, grid")
    bench.add_argument("--results", type=folder, default=RESULTS, help="for records, reports")
    bench.add_argument(
        "--parameters", action="store_true", help="print the parameters of NAME and stop"
    )
    bench.set_defaults(run=_bench)


def _add_records(verbs: argparse._SubParsersAction) -> None:
    listed = verbs.add_parser("records", help="list or export what was measured")
    listed.add_argument("run_id", nargs="?", metavar="RUN", help="the cases of one run")
    listed.add_argument("--results", type=folder, default=RESULTS)
    listed.add_argument("--export", type=Path, help="write .jsonl, .csv or .parquet")
    listed.add_argument("--samples", action="store_true", help="export raw samples, not cases")
    listed.set_defaults(run=_records)
    compared = verbs.add_parser("compare", help="two runs, cell by cell")
    compared.add_argument("a", metavar="A", help="run id, its beginning, or last-1")
    compared.add_argument("b", metavar="B", help="run id, its beginning, or last")
    compared.add_argument("--results", type=folder, default=RESULTS)
    compared.add_argument(
        "--threshold", type=float, default=0.05,
        help="exit 1 when B is surely slower by more than this share (0.05), 2 when none is judged",
    )  # fmt: skip
    compared.set_defaults(run=_compare)


def _delegate(verb: str, words: list[str]) -> int:
    """`plan` and `score` bring their own arguments."""
    module = importlib.import_module(f"pardemo.predict.{verb}_cli")
    own = Parser(prog=f"pardemo {verb}", description=f"{DELEGATED[verb].capitalize()}.")
    run = getattr(module, f"run_{verb}")
    return int(run(module.arguments(own).parse_args(words)) or 0)


def _bench(arguments: argparse.Namespace) -> int:
    from . import bench, notebooks, sweep

    if arguments.sweep is not None:
        if arguments.names or arguments.pairs:
            raise Refused("--sweep says it all: give either a sweep or a name with -p, not both")
        plan = sweep.load(arguments.sweep)
        return bench.run(plan.cases, arguments.results, plan)
    names = arguments.names or sweep.benchmarks()
    if arguments.parameters:
        for name in names:
            path = notebooks.find(name, "benchmarks")
            print(f"{path.stem}:")
            print("\n".join(f"  {line!r}" for line in notebooks.parameters(path).values()))
        return 0
    given = bench.as_pairs(arguments.pairs)
    return bench.run([sweep.checked(name, given) for name in names], arguments.results)


def _records(arguments: argparse.Namespace) -> int:
    from . import records

    store = _existing(arguments.results)
    run = store.find(arguments.run_id) if arguments.run_id else None
    if arguments.export is not None:
        count = records.export(store, arguments.export, run.id if run else None, arguments.samples)
        print(f"{count} rows in {arguments.export}")
        return 0
    if run is None:
        for row in store.runs():
            print(f"{row!r}  {len(store.cases(row.id))} cases")
        return 0
    print(f"{run!r}\nparameters {run.parameters}\ncommit {run.environment['commit'] or 'unknown'}")
    for case in store.cases(run.id):
        timing = records.timing(store, case)
        print(f"  {timing!r}" if timing else f"  {case!r}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from . import records

    store = _existing(arguments.results)
    found = records.compare(store, store.find(arguments.a), store.find(arguments.b))
    print(found)
    slower = found.regressions(arguments.threshold)
    for cell in slower:
        print(f"REGRESSION {cell.name}: slower by more than {arguments.threshold:.0%}")
    return int(bool(slower)) if found.judged else 2  # a gate that judged nothing has not passed


def _existing(results: Path) -> Store:
    from . import records

    path = results / "pardemo.sqlite"
    if not path.exists():
        raise Refused(f"no records in {results}; `pardemo bench` makes some")
    return records.open(path)


def _machine(_: argparse.Namespace) -> int:
    from .machine import machine

    print(machine().card())
    return 0


def _lab(arguments: argparse.Namespace) -> int:
    from . import lab

    return lab.run(arguments.port, not arguments.no_browser)


def _notebooks(arguments: argparse.Namespace) -> int:
    from . import notebooks

    paths = [notebooks.find(name) for name in arguments.names] or list(notebooks.known().values())
    failed, total_s = 0, 0.0
    for path in paths:
        try:
            taken_s = notebooks.refresh(path, mock=arguments.mock)
            total_s += taken_s
            print(f"{path.parent.name}/{path.name}: done in {taken_s:.0f} s", flush=True)
        except notebooks.NotebookFailed as error:
            failed += 1
            print(f"{error}\n  the file is as it was", file=sys.stderr, flush=True)
    if len(paths) > 1:
        print(f"{len(paths) - failed} of {len(paths)} notebooks in {total_s / 60:.1f} min")
    return 1 if failed else 0
