"""The `pardemo` command: a thin face over the package. Bad input is one line and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .parameters import Refused


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 1 failed, 2 refused, 130 stopped)."""
    arguments = parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (Refused, RuntimeError, OSError) as error:
        if arguments.debug:
            raise
        print(f"pardemo: {error}", file=sys.stderr)
        return 2 if isinstance(error, Refused) else 1


def parser() -> argparse.ArgumentParser:
    """The command line: one verb each, every verb with its own --help."""
    top = argparse.ArgumentParser(
        prog="pardemo", description="Measure parallel training in PyTorch, then plan it."
    )
    top.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    machine = verbs.add_parser("machine", help="print the machine card")
    machine.set_defaults(run=_machine)

    notebooks = verbs.add_parser("notebooks", help="re-execute notebooks in place")
    notebooks.add_argument("names", nargs="*", help="04_ddp or 04; without a name: all of them")
    notebooks.add_argument(
        "--mock", action="store_true", help="with the tests' small values; files stay as they are"
    )
    notebooks.set_defaults(run=_notebooks)
    return top


def _machine(_: argparse.Namespace) -> int:
    from .machine import machine

    print(machine().card())
    return 0


def _notebooks(arguments: argparse.Namespace) -> int:
    from . import notebooks

    paths = [notebooks.find(name) for name in arguments.names] or list(notebooks.known().values())
    failed = 0
    for path in paths:
        try:
            notebooks.refresh(path, mock=arguments.mock)
            print(f"{path.parent.name}/{path.name}: done", flush=True)
        except notebooks.NotebookFailed as error:
            failed += 1
            print(f"{error}\n  the file is as it was", file=sys.stderr, flush=True)
    return 1 if failed else 0
