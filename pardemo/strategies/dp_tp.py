"""Data parallel outside, tensor parallel inside: a 2-D mesh ("dp", "tp").

Split      layers over the t ranks of a row (see tensor.py), the batch over the d rows.
Sent       tensor's 2(t-1)/t A per all-reduce, with A of this row's share of the batch; then one
           all-reduce of the gradients this rank holds among the ranks with the same slice:
           2(d-1)/d P' b, where P' counts slices at 1/t and whole layers in full.
Memory     as tensor parallel: replicas share nothing.
Paper      Shoeybi 2019, section 3 and figure 8.
"""

from __future__ import annotations

from pardemo.strategies import base
from pardemo.strategies.tensor_build import KNOBS, build, reasons_on_mesh

STRATEGY = base.Strategy(
    name="dp_tp",
    title="data x tensor parallel",
    axes=("dp", "tp"),
    build=build,
    reasons_against=reasons_on_mesh(("dp", "tp")),
    knobs=KNOBS,
    lesson="10_combining",
)
