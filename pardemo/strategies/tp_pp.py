"""Pipeline outside, tensor parallel inside: a 2-D mesh ("pp", "tp").

Split      the model into p stages (see pipeline.py), the layers of each over t ranks (tensor.py).
Sent       pipeline's A per microbatch, boundary and way, by every rank of "tp" (the boundary's
           activation is whole on each, so it crosses t times); tensor's all-reduces within a stage,
           2(t-1)/t A each, m times per step.
Memory     1/t of the stage's sliced layers.
Paper      Narayanan 2021, section 3.2: tensor parallel inside a node, pipeline between nodes.
"""

from __future__ import annotations

from pardemo.strategies import base, pp_tp_build
from pardemo.strategies.pipeline_build import KNOBS

STRATEGY = base.Strategy(
    name="tp_pp",
    title="pipeline x tensor parallel",
    axes=("pp", "tp"),
    build=pp_tp_build.build,
    reasons_against=pp_tp_build.reasons(("pp", "tp")),
    knobs=KNOBS,
    lesson="10_combining",
)
