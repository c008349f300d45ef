"""Suite: every strategy on one workload and one machine, proven, predicted, measured, recorded.

table = suite.run("gpt-mini", nprocs=2)
print(suite.verdict(table))
"""

from . import claims
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
    "run",
    "scale",
    "verdict",
]
