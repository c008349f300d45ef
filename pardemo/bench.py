"""Run benchmark notebooks one after the other, record, resume, and write one report."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from . import explore, kernels, notebooks, page, records, strategies, workloads
from .cluster import cells, world
from .machine import machine
from .parameters import Refused, nearest, shown
from .sweep import Case, Sweep

POLL_S = 1.0


def run(cases: Sequence[Case], results: Path, sweep: Sweep | None = None) -> int:
    """Run every case, print its table, write the report; returns the exit code.

    A sweep that was interrupted goes on with the cases that have no row yet. One case at a time:
    benchmarks in parallel would time each other. Under torchrun or srun rank 0 does this, over all
    of the world's ranks; the others serve it and return 0. Refused, before any kernel starts, for
    a model or a strategy that does not exist.
    """
    for case in cases:
        _check_names(dict(case.given))
    with world.joined() as rank:
        return 0 if rank else _run(cases, results, sweep)


def _check_names(given: dict[str, Any]) -> None:
    model = given.get("model", "mine:")
    chosen = given.get("strategies", given.get("strategy", "all"))
    asked = [("model", model, workloads.names())] if ":" not in model else []
    if chosen != "all":
        asked += [("strategy", name.strip(), strategies.names()) for name in chosen.split(",")]
    for what, name, known in asked:
        if name not in known:
            raise Refused(f"there is no {what} {shown(name)}; {nearest(name, known)}")


def _run(cases: Sequence[Case], results: Path, sweep: Sweep | None) -> int:
    held = records.holder()
    if held:
        raise records.Busy(f"{held}; wait for it to end, or stop it")
    card = machine().card()
    print(card, flush=True)
    with closing(records.open(results / "pardemo.sqlite")) as store:
        return _recorded(cases, results, sweep, store, card)


def _recorded(
    cases: Sequence[Case], results: Path, sweep: Sweep | None, store: records.Store, card: str
) -> int:
    name = "sweep" if sweep else "bench"
    config = sweep.config if sweep else {"cases": [case.name for case in cases]}
    session = store.resume(name, config) if sweep else None
    resumed = session is not None
    session = session or store.begin(name, config)
    folder = results / session.id
    with session:
        folder.mkdir(mode=0o700, exist_ok=True)
        wanted = session.missing([case.name for case in cases])
        if resumed:
            done = len(cases) - len(wanted)
            print(f"resuming {session.id}: {done} of {len(cases)} cases are done")
        todo = [case for case in cases if case.name in wanted]
        failed = _all(todo, session, folder, results, cases)
    path = _report(cases, folder, store, card)
    print(f"\nreport: {path}")
    return 1 if failed else 0


def _all(
    todo: Sequence[Case],
    session: records.Run,
    folder: Path,
    results: Path,
    cases: Sequence[Case],
) -> int:
    """Run what is left; a case that fails is recorded as failed and the next one runs."""
    failed = 0
    for case in todo:
        number = list(cases).index(case) + 1
        try:
            with _progress(f"{number}/{len(cases)} {case.name}", _file(folder, number, case)):
                done = _one(case, _file(folder, number, case), results)
        except notebooks.NotebookFailed as error:
            failed += 1
            session.add(case.name, {"error": str(error)}, status="failed")
            print(f"{case.name}: FAILED\n  {error}", file=sys.stderr, flush=True)
            continue
        session.add(case.name, {"notebook": _file(folder, number, case).name})
        for text in [*page.text_of(done, "table"), *page.text_of(done, "verdict")]:
            print(f"\n{text.rstrip()}", flush=True)
    return failed


def _one(case: Case, output: Path, results: Path) -> NotebookNode:
    """Execute one benchmark; its kernel may import the user's own modules from here."""
    path = notebooks.find(case.benchmark, "benchmarks")
    given, known = dict(case.given), notebooks.parameters(path)
    if "results" in known:
        given.setdefault("results", str((results / "pardemo.sqlite").resolve()))
    try:
        with kernels.variables(_importable(Path.cwd())):
            if world.driving():  # a kernel would be no rank of torchrun's
                return cells.execute(path, output, world.counts(known) | given)
            return notebooks.execute(path, output, given)
    finally:
        if output.exists():
            output.chmod(0o600)


def _importable(folder: Path) -> dict[str, str]:
    """Variables with which a kernel and its ranks import modules of `folder`: -p model mine:make"""
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), before]))}


def _file(folder: Path, number: int, case: Case) -> Path:
    return folder / f"{number:02d}-{case.benchmark}.ipynb"


def _report(cases: Sequence[Case], folder: Path, store: records.Store, card: str) -> Path:
    """One page over every notebook of the session that exists, resumed ones too."""
    shown, doubts = [], []
    for number, case in enumerate(cases, 1):
        file = _file(folder, number, case)
        if file.exists():
            notebook = nbformat.read(file, 4)
            shown.append((f"{number}. {case.name}", notebook))
            doubts += [
                line
                for text in page.text_of(notebook, "doubts")
                for line in text.splitlines()
                if line.strip()
            ]
    doubts += [f"{what} in the results file failed its check" for what in store.bad]
    titles = dict.fromkeys(case.benchmark for case in cases)
    session = page.Session(
        title=f"pardemo: {', '.join(titles)}",
        card=card,
        notebooks=tuple(shown),
        doubts=tuple(dict.fromkeys(doubts)),
        records=f"records: {store.path.name}, session {folder.name}; export: pardemo records",
        explorers=_explorers(titles),
    )
    return page.write(session, folder / "report.html")


def _explorers(benchmarks: Iterable[str]) -> tuple[str, ...]:
    """The knobs that explain the strategies' numbers, where a report has any."""
    if "strategies" not in benchmarks:
        return ()
    return tuple(explore.fragment(name, level=3) for name in explore.names())


@contextmanager
def _progress(what: str, output: Path) -> Iterator[None]:
    """One line that says which case runs, how far it is and for how long; gone when done."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"{what} ...", file=sys.stderr, flush=True)
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task(what)
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(POLL_S):
                shown.update(task, description=f"{what}  {_said(output)}")

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()


def _said(output: Path) -> str:
    """How far the running notebook is: its cell, and the last line it printed."""
    try:
        cells = [c for c in nbformat.read(output, 4).cells if c.cell_type == "code"]
    except (OSError, ValueError):
        return ""
    done = sum(c.execution_count is not None for c in cells)
    lines = [
        line
        for cell in cells
        for item in cell.outputs
        if item.output_type == "stream"
        for line in str(item.text).splitlines()
        if line.strip()
    ]
    last = f": {lines[-1].strip()[:60]}" if lines else ""
    return f"cell {done}/{len(cells)}{last}"


def as_pairs(pairs: Sequence[Sequence[str]] | None) -> dict[str, Any]:
    """`-p name value -p ...` as a mapping; a name given twice is refused."""
    given: dict[str, Any] = {}
    for name, value in pairs or ():
        if name in given:
            raise Refused(f"parameter {name!r} is given twice")
        given[name] = value
    return given
