"""Explorer of layouts: the three best for a published model on a cluster, and how sure that is."""

from __future__ import annotations

from pardemo.explore.scene import Box, Explorer, Scene
from pardemo.predict import Cluster, layouts, model


def draw(model_name: str, gpus: int, profile: str) -> Scene:
    """Predicted step time of the three best layouts; the light end is the interval."""
    memory = 40e9 if profile.startswith("a100") else 80e9
    cluster = Cluster(gpus, memory_bytes=memory, profile=profile, name=f"{gpus} GPUs")
    plan = layouts(model(model_name), cluster)
    if not plan.choices:
        raise ValueError(f"{model_name} does not fit on {gpus} GPUs of {memory / 1e9:.0f} GB")
    boxes, lanes = [], []
    for lane, choice in enumerate(plan.top):
        lanes.append(repr(choice.layout).split(", zero")[0] + f", zero {choice.layout.zero}")
        kind = "tied" if choice.tied else "compute"
        boxes.append(Box(lane, 0.0, choice.lo_s, kind, f"{choice.time_s:.3g} s"))
        boxes.append(Box(lane, choice.lo_s, choice.hi_s - choice.lo_s, "interval"))
    best = plan.top[0]
    ties = sum(choice.tied for choice in plan.choices)
    said = (
        f"{model_name} on {gpus} GPUs ({profile}): best {best.layout!r}, {best.time_s:.3g} s "
        f"({best.lo_s:.3g} to {best.hi_s:.3g}) for a batch of {plan.global_batch}; "
        f"{ties} layouts are tied with it. {plan.evidence}"
    )
    numbers = {"best_s": best.time_s, "ties": ties}
    return Scene(tuple(lanes), tuple(boxes), "seconds per step", said, numbers)


EXPLORER = Explorer(
    "planner",
    "Which layout?",
    "How should this model be spread over this cluster?",
    {
        "model_name": ("llama3-8b", "llama3-70b", "llama3-405b"),
        "gpus": (64, 8, 256, 1024),
        "profile": ("h100-dgx", "a100-dgx"),
    },
    draw,
    "Predicted, not measured: measure the first three before you believe their order.",
)
