"""The few figures that every lesson, benchmark and report share, in one house style.

Each returns a matplotlib Figure whose alt text states the numbers it shows; as the last line of a
cell it displays itself, and `plot.caption(claim, conditions)` puts its claim below it as text.
"""

from .bars import anatomy, bytes, memory, throughput
from .lanes import lanes, schedule
from .points import curve, dots, scaling
from .style import LOOKS, OKABE_ITO, Picture, caption, look, panels, use

__all__ = [
    "LOOKS",
    "OKABE_ITO",
    "Picture",
    "anatomy",
    "bytes",
    "caption",
    "curve",
    "dots",
    "lanes",
    "look",
    "memory",
    "panels",
    "scaling",
    "schedule",
    "throughput",
    "use",
]
