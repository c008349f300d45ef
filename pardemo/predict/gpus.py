"""Data-sheet facts of GPUs, found by the name a table or a machine gives them.

Dense 16-bit peak without sparsity (V100: fp16 tensor cores), memory bandwidth, memory, NVLink per
direction, and the network per GPU of the usual server. NVIDIA and AMD product data sheets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU: FLOP/s, bytes/s, bytes; links per direction and device, in bytes/s."""

    name: str
    peak_flops: float
    memory_bandwidth: float
    memory_bytes: float
    node_link: float
    network: float
    known: bool = True


# the first pattern that is found in the name wins, so the more special ones come first
_TABLE = (
    ("B300", 2250e12, 8.0e12, 270e9, 900e9, 100e9),
    ("B200", 2250e12, 8.0e12, 180e9, 900e9, 50e9),
    ("GH200", 989e12, 4.0e12, 96e9, 450e9, 50e9),
    ("H200", 989e12, 4.8e12, 141e9, 450e9, 50e9),
    ("H800", 989e12, 3.35e12, 80e9, 200e9, 50e9),
    ("H20", 148e12, 4.0e12, 96e9, 450e9, 50e9),
    ("H100.*(96|HBM2e)", 989e12, 2.4e12, 96e9, 450e9, 50e9),
    ("H100.*PCI", 756e12, 2.0e12, 80e9, 32e9, 25e9),
    ("H100", 989e12, 3.35e12, 80e9, 450e9, 50e9),
    ("A800", 312e12, 2.04e12, 80e9, 200e9, 25e9),
    ("A100.*PCI", 312e12, 1.94e12, 80e9, 32e9, 12.5e9),
    ("A100.*40", 312e12, 1.56e12, 40e9, 300e9, 25e9),
    ("A100", 312e12, 2.04e12, 80e9, 300e9, 25e9),
    ("MI355", 2300e12, 8.0e12, 288e9, 538e9, 50e9),
    ("MI325", 1307e12, 6.0e12, 256e9, 448e9, 50e9),
    ("MI300", 1307e12, 5.3e12, 192e9, 448e9, 50e9),
    ("MI250", 191e12, 1.6e12, 64e9, 200e9, 12.5e9),
    ("L40", 181e12, 0.86e12, 48e9, 16e9, 12.5e9),
    ("A10", 125e12, 0.6e12, 24e9, 16e9, 6e9),
    ("V100", 125e12, 0.9e12, 32e9, 150e9, 6.25e9),
    ("RTX", 130e12, 0.67e12, 24e9, 50e9, 1.25e9),
    ("T4", 65e12, 0.32e12, 16e9, 16e9, 6e9),
)


def gpu(name: str) -> Gpu:
    """The GPU whose pattern is in `name`; an A100's facts with known=False when none is.

    The fitted constants are shares of these facts, so a calibration corrects a wrong guess.
    """
    for pattern, *facts in _TABLE:
        if re.search(pattern, name, re.IGNORECASE):
            memory = re.search(r"(\d+)\s*GB\b(?!/)", name)
            if memory and 8 <= int(memory.group(1)) <= 300:
                facts[2] = float(memory.group(1)) * 1e9
            peak, bandwidth, size, node, network = facts
            return Gpu(name, peak, bandwidth, size, node, network)
    return Gpu(name, 312e12, 2.04e12, 80e9, 300e9, 25e9, known=False)


def network_of(name: str) -> float | None:
    """Network bytes/s per GPU when the text says it: "8x200G ... /node", "400G RDMA/GPU"."""
    node = re.search(r"(\d+)\s*x\s*(\d+)\s*G[b ]?[^,;)]*(IB|RoCE|EFA|Ethernet)", name)
    if node:
        return int(node.group(1)) * int(node.group(2)) * 1e9 / 8 / 8
    one = re.search(r"(\d+)\s*G\w*\s+\w+/GPU", name)
    return int(one.group(1)) * 1e9 / 8 if one else None
