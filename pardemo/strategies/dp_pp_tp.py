"""Data, pipeline and tensor parallel: a 3-D mesh ("dp", "pp", "tp"), tensor innermost.

Split      the batch over d pipelines, each of p stages, each stage's layers over t ranks.
Sent       tp_pp's bytes with A of one pipeline's microbatch; then an all-reduce among the d ranks
           with the same slice of the same stage, 2(d-1)/d of the gradients held, and of tied ones
           between stages before it.
Memory     1/t of the stage's sliced layers; the d replicas share nothing.
Paper      Narayanan 2021, "PTD-P".
"""

from __future__ import annotations

from pardemo.strategies import base, pp_tp_build
from pardemo.strategies.pipeline_build import KNOBS

STRATEGY = base.Strategy(
    name="dp_pp_tp",
    title="data x pipeline x tensor parallel",
    axes=("dp", "pp", "tp"),
    build=pp_tp_build.build,
    reasons_against=pp_tp_build.reasons(("dp", "pp", "tp")),
    knobs=KNOBS,
    lesson="10_combining",
)
