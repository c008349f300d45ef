"""Running a cell's text on a rank, where IPython is not loaded."""

from __future__ import annotations

import ast
import linecache
import sys


def run_cell(cell: str, name: str, source: list[str]) -> str | None:
    """Run a cell in this rank's `__main__`; the repr of its last expression, if it ends in one.

    `name` is the file name the notebook has given the cell and `source` its lines, for tracebacks.
    A `;` at the end hides the last expression, as in a notebook.
    """
    linecache.cache[name] = (len(cell), None, source, name)
    tree = ast.parse(cell, name)
    namespace = vars(sys.modules["__main__"])
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr) or cell.rstrip().endswith(";"):
        exec(compile(tree, name, "exec"), namespace)
        return None
    tree.body.pop()
    exec(compile(tree, name, "exec"), namespace)
    value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
    return None if value is None else repr(value)
