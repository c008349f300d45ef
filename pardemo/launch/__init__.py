"""Run functions on ranks: from a cell, from a script, and unchanged under torchrun."""

from pardemo.launch.api import Ranks, launch
from pardemo.launch.failure import RankFailed, RankTimeout
from pardemo.launch.progress import report
from pardemo.launch.results import Results
from pardemo.launch.servers import warm_up

__all__ = ["RankFailed", "RankTimeout", "Ranks", "Results", "launch", "report"]

warm_up()
