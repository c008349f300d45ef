"""`python -m pardemo`: the same as the `pardemo` command."""

from .cli import command

if __name__ == "__main__":
    raise SystemExit(command())
