"""pardemo: learn parallel training in PyTorch by measuring it, then plan it for a cluster.

from pardemo import machine, launch, Ranks, report     # the four names that every lesson uses
%load_ext pardemo                                       # %%ranks: a cell on every rank
"""

from typing import Any

from pardemo.stop import while_loading

while_loading()

from pardemo.versions import demand  # noqa: E402

demand("torch")

from pardemo.launch import RankFailed, Ranks, RankTimeout, Results, launch, report  # noqa: E402
from pardemo.machine import Machine, machine  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "Machine",
    "RankFailed",
    "RankTimeout",
    "Ranks",
    "Results",
    "launch",
    "machine",
    "report",
]


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext pardemo` in a notebook gives `%%ranks` and `%ranks`."""
    from pardemo.launch.magic import load_ipython_extension as load

    load(shell)


def __getattr__(name: str) -> Any:
    """`pardemo.diagnose`, `observe` and `calibrate` load the measuring room when asked for."""
    if name in ("calibrate", "diagnose", "observe"):
        from pardemo import measure

        return getattr(measure, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
