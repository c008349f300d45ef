"""`python -m pardemo.cluster VERB`: this room's verbs alone, for programs that start it."""

from __future__ import annotations

import argparse
import signal
import sys

from pardemo.cluster.cli import add_parsers
from pardemo.parameters import Refused
from pardemo.stop import loaded


def main() -> int:
    loaded()
    top = argparse.ArgumentParser(prog="pardemo")
    add_parsers(top.add_subparsers(required=True, metavar="VERB"))
    arguments = top.parse_args()
    try:
        return int(arguments.run(arguments) or 0)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except (Refused, RuntimeError, OSError) as error:
        print(f"pardemo: {error}", file=sys.stderr)
        return 2 if isinstance(error, Refused) else 1


if __name__ == "__main__":
    raise SystemExit(main())
