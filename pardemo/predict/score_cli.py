"""`pardemo score FILE.csv [--calibrate-rows N] [--seed S]`: the report, then one line of JSON."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from pardemo.predict.score import score
from pardemo.predict.tables import TableError


def arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the command's arguments to a parser."""
    parser.add_argument("file", type=Path, help="a CSV of published runs or collectives")
    parser.add_argument(
        "--calibrate-rows", type=int, default=None, metavar="N",
        help="rows to calibrate on (default 50, or half of a small table)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="which rows those are (default 0)")
    parser.add_argument(
        "--most-nodes", type=float, default=math.inf, metavar="N",
        help="calibrate on runs of at most so many nodes",
    )  # fmt: skip
    parser.add_argument(
        "--most-parameters", type=float, default=math.inf, metavar="N",
        help="calibrate on models of at most so many parameters (7e9)",
    )  # fmt: skip
    parser.add_argument("--brief", action="store_true", help="leave the constants out")
    return parser


def run_score(options: argparse.Namespace) -> int:
    """Print the report and, as the last line, the JSON document; TableError for a bad file."""
    found = score(
        options.file, options.calibrate_rows, options.seed, options.most_nodes,
        options.most_parameters,
    )  # fmt: skip
    text = repr(found)
    if options.brief:
        text = "\n".join(x for x in text.splitlines() if not x.startswith(("    ", "  constants")))
    print(text)
    print(found.json())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command by itself; 2 for a file that is no good."""
    parser = argparse.ArgumentParser(
        prog="pardemo score",
        description="Predict a table of published runs and print the errors.",
    )
    options = arguments(parser).parse_args(argv)
    try:
        return run_score(options)
    except TableError as error:
        print(f"pardemo score: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
