"""`%%ranks`: a cell on every rank, its state kept between cells; `%ranks` to look and to reset."""

from __future__ import annotations

import ast
import linecache
from typing import Any

from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell

from pardemo.launch import status
from pardemo.launch.api import Ranks
from pardemo.launch.cell import run_cell

_USAGE = "%ranks status | reset | push NAME... | pull NAME, or %%ranks [N] [--only 0,2]"


class RanksMagic:
    """The magics of one shell and the ranks behind them."""

    def __init__(self, shell: InteractiveShell) -> None:
        self.shell = shell
        self.ranks: Ranks | None = None

    def cell(self, line: str, cell: str) -> None:
        """`%%ranks [N] [--only 0,2]`: run the cell on N ranks (as many as before by default).

        Prints are labelled with their rank; the last expression of each rank is shown. Asking
        for another N starts new ranks, without the state of the old ones.
        """
        nprocs, only = _parse(line)
        ranks = self._get(nprocs)
        chosen = only if only is not None else list(range(ranks.setup.nprocs))
        beyond = [rank for rank in chosen if rank not in range(ranks.setup.nprocs)]
        if beyond:
            raise UsageError(f"there is no rank {beyond[0]}: {ranks.setup.nprocs} ranks run")
        ast.parse(cell)  # a slip of the pen ends here, and not the ranks
        name = self.shell.compile.cache(cell, self.shell.execution_count, raw_code=cell)
        source = linecache.getlines(name)
        results = ranks.run(run_cell, (cell, name, source), {}, only=chosen)
        for rank, shown in zip(chosen, results, strict=True):
            if shown is not None:
                print("\n".join(f"[rank {rank}] {part}" for part in shown.splitlines()))

    def line(self, line: str) -> Any:
        """`%ranks status`, `reset`, `push NAME...` (from here to all), `pull NAME` (a list)."""
        words = line.split() or ["status"]
        if words[0] == "reset" and len(words) == 1:
            self.close()
            print("the ranks have ended; the next %%ranks starts new ones")
            return None
        if words[0] == "status" and len(words) == 1:
            print(status.table(self.ranks.status()) if self.ranks else "no ranks run")
            return None
        if words[0] == "push" and len(words) > 1:
            missing = [name for name in words[1:] if name not in self.shell.user_ns]
            if missing:
                raise UsageError(f"there is no variable {missing[0]!r} here to push")
            self._get(None).push(**{name: self.shell.user_ns[name] for name in words[1:]})
            return None
        if words[0] == "pull" and len(words) == 2:
            return self._get(None).pull(words[1])
        raise UsageError(_USAGE)

    def close(self) -> None:
        """End the ranks."""
        if self.ranks is not None:
            self.ranks.close()
            self.ranks = None

    def _get(self, nprocs: int | None) -> Ranks:
        """The ranks that run, or new ones where there are none or another number is asked for."""
        if self.ranks is not None and nprocs not in (None, self.ranks.setup.nprocs):
            had = self.ranks.setup.nprocs
            self.close()
            print(f"note: {nprocs} new ranks instead of {had}; the state of the old ones is gone")
        if self.ranks is None:
            self.ranks = Ranks(nprocs)
        return self.ranks


def _parse(line: str) -> tuple[int | None, list[int] | None]:
    """`4 --only 0,2` as (4, [0, 2]); what is not given is None."""
    nprocs, only = None, None
    words = line.split()
    try:
        while words:
            word = words.pop(0)
            if word == "--only":
                only = sorted({int(rank) for rank in words.pop(0).split(",")})
            else:
                nprocs = int(word)
    except (ValueError, IndexError):
        raise UsageError(_USAGE) from None
    return nprocs, only


def load_ipython_extension(shell: Any) -> None:
    """Register `%ranks` and `%%ranks`."""
    magic = RanksMagic(shell)
    shell.register_magic_function(magic.cell, "cell", "ranks")
    shell.register_magic_function(magic.line, "line", "ranks")
