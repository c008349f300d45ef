"""By hand, on a quiet machine: how far off predictions are, over models and strategies together.

    python tests/suite/how_far_off.py [MODEL ...] [--seconds S] [--profile FILE]

Every model goes through the suite as in benchmarks/strategies.ipynb: proven, predicted, measured,
with one calibrated profile for all of them (`--profile` keeps it in a file, and reads it again).
Prints every prediction beside its measurement, the median error of each model and of all together,
and exits with 1 where that is above 10 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from pardemo import machine, suite
from pardemo.measure import calibrate
from pardemo.predict import Profile, load

MODELS = ("gpt-mini", "moe-mini", "resnet-mini", "mlp")
AIM = 0.10


def known(path: Path | None) -> Profile:
    """The profile in the file, or one of this machine now, kept there."""
    if path is not None and path.exists():
        return load(path)
    made = calibrate()
    if path is not None:
        path.write_text(json.dumps(made))
    return load(made)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--profile", type=Path)
    given = parser.parse_args()
    profile, errors = known(given.profile), []
    print(machine().card(), profile, sep="\n")
    for model in given.models:
        table = suite.run(
            model, seconds=given.seconds, anatomy=False, profile=profile, say=lambda _: None
        )
        rows = [row for row in table.timed if row.error is not None]
        for row in rows:
            print(
                f"{model:<12} {row.name:<15} measured {1e3 * row.step_s:7.2f} ms, predicted "
                f"{1e3 * row.predicted_s:7.2f}, {row.error:+.0%} {row.step.status}"
            )
        print(*(note for note in table.notes if "predict" in note), sep="\n", flush=True)
        errors += [abs(row.error) for row in rows]
    middle = statistics.median(errors)
    print(f"{len(errors)} predictions, median error {middle:.1%}, worst {max(errors):.0%}")
    return int(middle > AIM)


if __name__ == "__main__":
    sys.exit(main())
