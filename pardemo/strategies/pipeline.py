"""Pipeline parallelism: consecutive layers on different ranks, several microbatches under way.

Split      the model by layers into p stages (p times `virtual` with interleaving), the batch into
           m equal microbatches.
Sent       a rank sends A bytes per microbatch and boundary to the right (activations, forward) and
           to the left (their gradients, backward): 2 m A for an inner rank, m A at both ends, times
           the number of boundaries where stages interleave; A is one microbatch's activation. A
           parameter of S bytes that k stages share: one all-reduce among them, 2(k-1)/k S. The
           loss, summed in float64: 8 bytes from the last stage to all.
Memory     parameters, gradients and optimiser state of the rank's own stages; activations of up to
           m microbatches (gpipe) or p (1f1b).
Idle       (p-1)/(m+p-1) of the step for gpipe and 1f1b; (p-1)/(v m) of the ideal time, interleaved.
Papers     Huang 2019 (GPipe); Narayanan 2019 and 2021 (1F1B, interleaved); Qi 2023 and 2024 (zero
           bubble, ZBV); Lamy-Poirier 2023 (looped BFS); DeepSeek-V3 2024 (DualPipeV is its fold).

A BatchNorm sees microbatches instead of the batch, so training differs. A model with one gets a
single microbatch (gpipe) by default; more are refused unless batchnorm="per_microbatch" accepts it.
A mixture of experts counts its choices over the batch: one microbatch too, and more are refused.
"""

from __future__ import annotations

from pardemo.strategies import base
from pardemo.strategies.pipeline_build import KNOBS, build, reasons_against

STRATEGY = base.Strategy(
    name="pipeline",
    title="pipeline parallel",
    axes=("pp",),
    build=build,
    reasons_against=reasons_against,
    knobs=KNOBS,
    lesson="06_pipeline_parallelism",
)
