"""Explorer of DDP's buckets: when gradients are ready, when they are sent, what is exposed."""

from __future__ import annotations

from pardemo.explore.scene import Box, Explorer, Scene
from pardemo.predict import wire_factor

LAYERS = 12
PIECES = 4  # gradients that a layer's backward finishes one after the other
LAYER_BYTES = 28e6  # a gpt2 block: 12 x 768 x 768 parameters of 4 bytes
FORWARD_S, BACKWARD_S = 0.002, 0.004  # of one layer


def buckets(bucket_bytes: float) -> list[int]:
    """How many gradients each bucket holds: it closes when the next one would not fit."""
    most = max(1, int(bucket_bytes * PIECES // LAYER_BYTES))
    whole, rest = divmod(LAYERS * PIECES, most)
    return [most] * whole + [rest] * (rest > 0)


def draw(bucket_mb: int, link_gb_per_s: float, latency_us: int, ranks: int) -> Scene:
    """One step: a bucket is sent when its last gradient is ready, one bucket at a time."""
    forward_s = LAYERS * FORWARD_S
    boxes = [Box(0, i * FORWARD_S, FORWARD_S, "forward", str(i)) for i in range(LAYERS)]
    for place, layer in enumerate(reversed(range(LAYERS))):
        start = forward_s + place * BACKWARD_S
        boxes.append(Box(0, start, BACKWARD_S, "backward", str(layer)))
    computed_s, free, done = forward_s + LAYERS * BACKWARD_S, 0.0, 0
    groups = buckets(bucket_mb * 1e6)
    for number, pieces in enumerate(groups):
        done += pieces
        sent = wire_factor("all_reduce", ranks) * LAYER_BYTES * pieces / PIECES
        start = max(free, forward_s + done * BACKWARD_S / PIECES)
        free = start + latency_us * 1e-6 + sent / (link_gb_per_s * 1e9)
        boxes.append(Box(1, start, free - start, "collective", str(number)))
    exposed, step = max(0.0, free - computed_s), max(free, computed_s)
    shown = tuple(Box(b.lane, b.start * 1e3, b.width * 1e3, b.kind, b.text) for b in boxes)
    said = (
        f"{len(groups)} bucket{'s' * (len(groups) > 1)}: the step takes {step * 1e3:.3g} ms, of "
        f"which {exposed * 1e3:.3g} ms is exposed transfer, sending that computing does not hide."
    )
    numbers = {"buckets": len(groups), "exposed_s": exposed, "step_s": step}
    return Scene(("compute", "send"), shown, "ms", said, numbers)


EXPLORER = Explorer(
    "buckets",
    "DDP: buckets and overlap",
    "When is a gradient sent, and what part of the sending shows in the step time?",
    {
        "bucket_mb": (28, 7, 56, 112, 336),
        "link_gb_per_s": (12.0, 4.0, 50.0),
        "latency_us": (20, 500),
        "ranks": (8, 2, 64),
    },
    draw,
    f"Computed for {LAYERS} layers of {LAYER_BYTES / 1e6:.0f} MB, {FORWARD_S * 1e3:g} ms forward "
    f"and {BACKWARD_S * 1e3:g} ms backward each; one bucket is sent at a time.",
)
