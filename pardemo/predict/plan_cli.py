"""`pardemo plan --model NAME --ranks N`: rank the layouts of a model on a cluster, as a table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from pardemo.predict.layouts import Plan, layouts
from pardemo.predict.model import MODELS, Cluster, Transformer, model
from pardemo.predict.profile import load, shipped

MOST_RANKS = 1_000_000
SIZES = ("layers", "hidden", "heads", "ffn", "vocab", "seq", "kv_heads", "experts", "top_k")


def arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the command's arguments to a parser."""
    parser.add_argument(
        "--model", required=True, metavar="NAME",
        help=f"{', '.join(MODELS)}; or sizes: layers=32,hidden=4096,heads=32,ffn=14336,"
        "vocab=128256,seq=8192[,kv_heads=8,gated=1,experts=8,top_k=2]; name,seq=4096 changes one",
    )  # fmt: skip
    parser.add_argument(
        "--cluster", default="h100-dgx", metavar="PROFILE[:RANKS]",
        help=f"{', '.join(shipped())}, or a file from calibrate(); default h100-dgx",
    )  # fmt: skip
    parser.add_argument("--ranks", type=int, help="devices in all (default: one node)")
    parser.add_argument("--global-batch", type=int, default=0, help="sequences per step")
    parser.add_argument("--memory-gb", type=float, help="memory of a device (default: profile's)")
    parser.add_argument("--rows", type=int, default=10, help="rows of the table")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    return parser


def _whole(text: str) -> bool:
    """Whether int() reads it as a whole number of a sane length, without signs or other scripts."""
    return text.isascii() and text.isdigit() and len(text) <= 40


def parse_model(text: str) -> Transformer:
    """A model from its name, its sizes, or a name and changes; ValueError says what is wrong."""
    words = [w for w in text.split(",") if w]
    name = words.pop(0) if words and "=" not in words[0] else ""
    sizes: dict[str, int | bool | str] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in (*SIZES, "gated", "tied"):
            known = ", ".join((*SIZES, "gated", "tied"))
            raise ValueError(f"--model: unknown size {key[:80]!r}; known: {known}")
        if not _whole(value):
            raise ValueError(f"--model: {key} must be a whole number, got {value[:40]!r}")
        if key in sizes:
            raise ValueError(f"--model: {key} is given twice")
        if key in ("gated", "tied") and value not in ("0", "1"):
            raise ValueError(f"--model: {key} is 0 or 1, got {value!r}")
        sizes[key] = value == "1" if key in ("gated", "tied") else int(value)
    if name:
        return model(name, **sizes)
    missing = [k for k in SIZES[:6] if k not in sizes]
    if missing:
        raise ValueError(f"--model: missing {', '.join(missing)}")
    return Transformer(**sizes)  # type: ignore[arg-type]


def make_plan(options: argparse.Namespace) -> Plan:
    """The plan the options ask for."""
    name, _, count = str(options.cluster).rpartition(":")
    if not name or not _whole(count):
        name, count = str(options.cluster), ""
    if not name:
        raise ValueError(f"--cluster: no profile is named; shipped: {', '.join(shipped())}")
    profile = load(name)
    ranks = int(count or profile.per_node) if options.ranks is None else options.ranks
    memory_gb = profile.memory_bytes / 1e9 if options.memory_gb is None else options.memory_gb
    if not 1 <= ranks <= MOST_RANKS:
        raise ValueError(f"--ranks must be at least 1 and at most {MOST_RANKS:,}, got {ranks}")
    if not 0 < memory_gb <= 1e6:
        raise ValueError(f"--memory-gb must be above 0 and at most 1e6, got {memory_gb}")
    for name, least in (("rows", 1), ("global_batch", 0)):
        if not least <= getattr(options, name) <= MOST_RANKS:
            said = f"at least {least} and at most {MOST_RANKS:,}"
            raise ValueError(
                f"--{name.replace('_', '-')} must be {said}, got {getattr(options, name)}"
            )
    memory = memory_gb * 1e9
    cluster = Cluster(ranks, profile.per_node, memory, profile.name, name=f"{ranks} ranks")
    return layouts(parse_model(options.model), cluster, options.global_batch, profile)


def run_plan(options: argparse.Namespace) -> int:
    """Print the table, the best layout's terms, and which to measure; 1 when nothing fits."""
    plan = make_plan(options)
    print(plan.table(options.rows))
    if not plan.choices:
        print(f"pardemo plan: {plan!r}", file=sys.stderr)
        return 1
    print("\n" + plan.picture(options.rows))
    print("\nthe first, term by term")
    print(plan.explain(load(str(options.cluster).split(":")[0])).table())
    print("\nmeasure these three before you decide:")
    for choice in plan.top:
        print(f"  {choice.layout!r}")
    if options.json:
        document = {"model": plan.model.name, "counts": plan.counts, "evidence": plan.evidence}
        print(json.dumps(document | plan.data()))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command by itself; 2 for options that cannot be meant."""
    parser = argparse.ArgumentParser(
        prog="pardemo plan", description="Rank the layouts of a model on a cluster."
    )
    options = arguments(parser).parse_args(argv)
    try:
        return run_plan(options)
    except ValueError as error:
        print(f"pardemo plan: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


__all__ = ["arguments", "main", "make_plan", "parse_model", "run_plan"]
