"""Suite: every strategy on one workload and one machine, proven, predicted, measured, recorded.

table = suite.run("gpt-mini", nprocs=2)
print(suite.verdict(table))
suite.foretell(["ddp", "fsdp"], work, ranks)    # predictions alone, before anything is run
"""

from . import claims
from .foretold import foretell
from .run import run
from .scaling import Point, Scaling, scale
from .table import ALL, ONE, Row, Table
from .verdict import doubts, verdict

__all__ = [
    "ALL",
    "ONE",
    "Point",
    "Row",
    "Scaling",
    "Table",
    "claims",
    "doubts",
    "foretell",
    "run",
    "scale",
    "verdict",
]
