"""Explorer of DDP's buckets: when gradients are ready, when they are sent, what is exposed."""

from __future__ import annotations

from pardemo.explore.scene import Box, Explorer, Scene
from pardemo.predict import wire_factor

LAYERS = 12
LAYER_BYTES = 28e6  # a gpt2 block: 12 x 768 x 768 parameters of 4 bytes
FORWARD_S, BACKWARD_S = 0.002, 0.004  # of one layer
LATENCY_S = 2e-5  # of one all-reduce


def buckets(bucket_bytes: float) -> list[list[int]]:
    """Layers of each bucket in the order in which backward finishes them: last layer first."""
    found: list[list[int]] = [[]]
    for layer in reversed(range(LAYERS)):
        if found[-1] and (len(found[-1]) + 1) * LAYER_BYTES > bucket_bytes:
            found.append([])
        found[-1].append(layer)
    return found


def draw(bucket_mb: int, link_gb_per_s: float, ranks: int) -> Scene:
    """One step: a bucket is sent when its last gradient is ready, one bucket at a time."""
    forward_s = LAYERS * FORWARD_S
    boxes = [Box(0, i * FORWARD_S, FORWARD_S, "forward", str(i)) for i in range(LAYERS)]
    ready = {}
    for place, layer in enumerate(reversed(range(LAYERS))):
        start = forward_s + place * BACKWARD_S
        boxes.append(Box(0, start, BACKWARD_S, "backward", str(layer)))
        ready[layer] = start + BACKWARD_S
    computed_s, free = forward_s + LAYERS * BACKWARD_S, 0.0
    groups = buckets(bucket_mb * 1e6)
    for number, layers in enumerate(groups):
        sent = wire_factor("all_reduce", ranks) * LAYER_BYTES * len(layers)
        start = max(free, max(ready[layer] for layer in layers))
        free = start + LATENCY_S + sent / (link_gb_per_s * 1e9)
        boxes.append(Box(1, start, free - start, "collective", str(number)))
    exposed = max(0.0, free - computed_s)
    step = max(free, computed_s)
    shown = tuple(Box(b.lane, b.start * 1e3, b.width * 1e3, b.kind, b.text) for b in boxes)
    said = (
        f"{len(groups)} buckets; the step takes {step * 1e3:.3g} ms, of which {exposed * 1e3:.3g} "
        f"ms is exposed transfer: sending that computing does not hide."
    )
    numbers = {"buckets": len(groups), "exposed_s": exposed, "step_s": step}
    return Scene(("compute", "send"), shown, "ms", said, numbers)


EXPLORER = Explorer(
    "buckets",
    "DDP: buckets and overlap",
    "When is a gradient sent, and what part of the sending shows in the step time?",
    {
        "bucket_mb": (25, 1, 56, 112, 400),
        "link_gb_per_s": (12.0, 1.0, 4.0, 50.0, 300.0),
        "ranks": (8, 2, 4, 64),
    },
    draw,
    f"Computed: {LAYERS} layers of {LAYER_BYTES / 1e6:.0f} MB, {FORWARD_S * 1e3:g} ms forward "
    f"and {BACKWARD_S * 1e3:g} ms backward each; a bucket at a time, {LATENCY_S * 1e6:g} µs first.",
)
