"""Wrong answers to the checks of lesson 03; each must be told "not yet"."""

from __future__ import annotations

WRONG = {
    "root_sends": [
        lambda parameters, numbers, n: 4 * parameters + 4 * numbers,
        lambda parameters, numbers, n: 4 * (n - 1) / n * (parameters + numbers),
        lambda parameters, numbers, n: 4 * (n - 1) * (parameters + numbers),
    ],
    "part_sizes": [
        lambda samples, devices: [samples // devices] * devices,
        lambda samples, devices: [
            samples // devices + (i < samples % devices) for i in range(devices)
        ],
    ],
    "combine": [
        lambda means, sizes: sum(means) / len(means),
        lambda means, sizes: sum(m * s for m, s in zip(means, sizes, strict=True)),
    ],
}
