"""By hand: how often a notebook hangs on an Output widget, and how often on an explorer.

    python tests/explore/output_widget.py [TIMES]

Executes a notebook of one cell so many times with each, in turns; an execution whose cell has no
reply after 40 s (it takes seconds) counts as hung.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat

from pardemo import notebooks

CELLS = {
    "Output widget": "from pardemo import explore\nfrom ipywidgets import interactive_output\n"
    "live = explore.live('ring')\n"
    "interactive_output(lambda **_: print('shown'), live.controls)",
    "explorer": "from pardemo import explore\nexplore.live('ring')",
}
LIMIT_S = 40.0


def main(times: int) -> None:
    hung = dict.fromkeys(CELLS, 0)
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(times):
            for name, source in CELLS.items():
                path = Path(folder) / "one.ipynb"
                cells = [nbformat.v4.new_code_cell(source)]
                nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
                try:
                    notebooks.execute(path, timeout_s=LIMIT_S)
                except notebooks.NotebookFailed as error:
                    hung[name] += "took too long" in str(error)
            print(turn + 1, hung, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
