"""Data parallel outside, pipeline inside: a 2-D mesh ("dp", "pp").

Split      the batch over d pipelines, the model over the p stages of each (see pipeline.py).
Sent       pipeline's A per microbatch, boundary and way, A of a pipeline's own microbatch; then one
           all-reduce of the gradients among the ranks with the same stage: 2(d-1)/d P_stage b.
Memory     as the pipeline.
Papers     Huang 2019, section 2.2; Narayanan 2021, section 3.
"""

from __future__ import annotations

from pardemo.strategies import base
from pardemo.strategies.pipeline_build import KNOBS, build, reasons_on_mesh

STRATEGY = base.Strategy(
    name="dp_pp",
    title="data x pipeline parallel",
    axes=("dp", "pp"),
    build=build,
    reasons_against=reasons_on_mesh(("dp", "pp")),
    knobs=KNOBS,
    lesson="10_combining",
)
