"""Explorer of memory: what a rank keeps under data parallelism and each stage of ZeRO."""

from __future__ import annotations

from pardemo.explore.scene import Box, Explorer, Scene
from pardemo.predict import memory

STRATEGIES = {"ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3 (FSDP)"}
PARTS = ("parameters", "gradients", "optimizer")


def draw(billions: float, ranks: int, precision: str) -> Scene:
    """Bytes per rank for a model of so many parameters under Adam; activations not counted."""
    mixed = precision == "bf16 + fp32 master"
    boxes, totals = [], {}
    for lane, name in enumerate(STRATEGIES):
        found = memory(
            name, parameters=billions * 1e9, ranks=ranks, optimizer="adam",
            bytes_per_element=2 if mixed else 4, master=mixed,
        )  # fmt: skip
        start = 0.0
        for part in PARTS:
            size = found[part] / 1e9
            boxes.append(Box(lane, start, size, part, f"{float(f'{size:.3g}'):,g}"))
            start += size
        totals[name] = start
    said = f"{billions:g} billion parameters on {ranks} ranks: " + ", ".join(
        f"{STRATEGIES[name]} {float(f'{total:.3g}'):,g} GB" for name, total in totals.items()
    )
    lanes = tuple(STRATEGIES.values())
    return Scene(lanes, tuple(boxes), "GB per rank", said + " per rank.", totals)


EXPLORER = Explorer(
    "zero",
    "Memory of the ZeRO stages",
    "What fits on one rank, and how many ranks does it take?",
    {
        "billions": (1.5, 0.124, 7, 70, 405),
        "ranks": (8, 1, 2, 4, 16, 64, 512),
        "precision": ("bf16 + fp32 master", "fp32"),
    },
    draw,
    "Closed form, Adam; activations and buffers come on top.",
)
