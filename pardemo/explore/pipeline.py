"""Explorer of pipeline schedules: stages, microbatches, virtual stages, schedule."""

from __future__ import annotations

from pardemo.explore.scene import Box, Explorer, Scene
from pardemo.predict import schedule

KINDS = {"F": "forward", "B": "backward", "W": "weight"}


def draw(schedule_name: str, stages: int, microbatches: int, virtual: int) -> Scene:
    """One optimiser step of a pipeline whose backward takes twice its forward."""
    chunks = {"interleaved": virtual, "zbv": 2}.get(schedule_name, 1)
    found = schedule(schedule_name, stages, microbatches, 1.0 / chunks, 2.0 / chunks, chunks=chunks)
    boxes = tuple(
        Box(span.rank, span.start, span.end - span.start, KINDS[span.kind], str(span.microbatch))
        for span in found.spans
    )
    said = (
        f"{found.bubble:.1%} of the ranks' time is bubble; the step takes {found.time:.4g} ticks. "
        f"Most microbatches kept at once: {max(found.peak_activations):g}."
    )
    numbers = {"bubble": found.bubble, "time": found.time, "kept": max(found.peak_activations)}
    lanes = tuple(f"rank {rank}" for rank in range(found.ranks))
    return Scene(lanes, boxes, "ticks (a forward of a whole stage takes 1)", said, numbers)


EXPLORER = Explorer(
    "pipeline",
    "Pipeline schedules",
    "How many microbatches does it take to make the bubble small, and what do they cost?",
    {
        "schedule_name": ("1f1b", "gpipe", "interleaved", "zb-h1", "zbv"),
        "stages": (4, 2, 3),
        "microbatches": (4, 1, 2, 8, 12),
        "virtual": (2, 1),
    },
    draw,
    "Simulated: equal stages, a backward takes twice a forward, sending is free.",
)
