"""Suite: every strategy on one workload and one machine, proven, predicted, measured, recorded.

table = suite.run("gpt-mini", nprocs=2)
print(suite.verdict(table))
"""

from .run import run
from .table import ALL, ONE, Row, Table
from .verdict import doubts, verdict

__all__ = ["ALL", "ONE", "Row", "Table", "doubts", "run", "verdict"]
