"""`python -m pardemo`: the same as the `pardemo` command."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
