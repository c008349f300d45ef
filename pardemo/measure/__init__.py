"""Measure: times, bytes, memory, time lines, and whether they may be believed.

From a notebook (each starts or borrows ranks)
    compare(cases, ranks=None, rounds=8, budget_s=60, ...) -> Comparison    interleaved rounds
    decompose(case, ...) -> Anatomy            compute, exposed and overlapped transfer, idle
    timeline(case, ...) -> Timeline            spans per rank on one clock
    calibrate(...) -> dict                     this machine's profile, for prediction
    observe(train, ...) -> Run;  diagnose(run) -> Diagnosis

Inside a rank
    count(step) -> Traffic                     bytes per collective kind, group and phase
    quiet(group=None)                          context: collectives move nothing
    weigh(step, model=None) -> MemoryReport    what one step keeps in memory
    count_flops(step) -> Flops
"""

from __future__ import annotations

from pardemo.measure.anatomy import Anatomy, Share, decompose
from pardemo.measure.calibrate import calibrate
from pardemo.measure.collectives import Measured, sweep
from pardemo.measure.diagnose import Diagnosis, Finding, diagnose
from pardemo.measure.flops import Flops, Peak, Utilization, count_flops, peak_flops
from pardemo.measure.inside import Case
from pardemo.measure.memory import MemoryReport, weigh
from pardemo.measure.observe import Run, observe
from pardemo.measure.quiet import quiet
from pardemo.measure.rounds import Comparison, compare
from pardemo.measure.samples import Samples
from pardemo.measure.spans import Span
from pardemo.measure.timeline import NothingFound, Timeline, timeline
from pardemo.measure.timing import Ratio, Timing
from pardemo.measure.traffic import Counting, Flow, Traffic, count

__all__ = [
    "Anatomy",
    "Case",
    "Comparison",
    "Counting",
    "Diagnosis",
    "Finding",
    "Flops",
    "Flow",
    "Measured",
    "MemoryReport",
    "NothingFound",
    "Peak",
    "Ratio",
    "Run",
    "Samples",
    "Share",
    "Span",
    "Timeline",
    "Timing",
    "Traffic",
    "Utilization",
    "calibrate",
    "compare",
    "count",
    "count_flops",
    "decompose",
    "diagnose",
    "observe",
    "peak_flops",
    "quiet",
    "sweep",
    "timeline",
    "weigh",
]
