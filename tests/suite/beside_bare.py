"""By hand, on a quiet machine: pardemo's speed-up and exposed transfer beside a bare script's.

    python tests/suite/beside_bare.py [ROUNDS]

Every round runs bare_ddp.py, which knows nothing of pardemo, and pardemo's own measurement of the
same model, one after the other. Prints both and exits with 1 where the speed-ups differ by more
than 2 %, or the exposed shares of a step by more than two points.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import bare_ddp
import torch

from pardemo.launch import Ranks
from pardemo.measure import Case, compare, decompose
from pardemo.suite import inside
from pardemo.workloads import Workload, sgd

HERE = Path(__file__).parent
SPEEDUP, SHARE = 0.02, 0.02


def make_model(seed: int) -> torch.nn.Module:
    return bare_ddp.model()


def make_batch(size: int, step: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return bare_ddp.batch(size)


def optimizer(parameters: object) -> torch.optim.Optimizer:
    return sgd(parameters, lr=0.01)  # type: ignore[arg-type]


def ours(ranks: Ranks) -> tuple[float, float]:
    """(speed-up of ddp over one process, exposed share of a ddp step) by pardemo."""
    loss = torch.nn.functional.cross_entropy
    work = Workload("bare", make_model, make_batch, loss, optimizer, bare_ddp.BATCH)
    single = Case(inside.Maker("single", work, bare_ddp.BATCH), ranks=1)
    ddp = Case(inside.Maker("ddp", work, bare_ddp.BATCH), ranks=2, mesh={"dp": 2}, label="ddp")
    found = compare({"single": single, "ddp": ddp}, ranks=ranks, rounds=12, budget_s=20)
    parts = decompose(ddp, ranks=ranks, rounds=12, budget_s=20)
    step_s = found["ddp"].median_s
    return found["single"].median_s / step_s, parts.exposed_s / step_s


def bare() -> tuple[float, float]:
    """The same from a script without pardemo."""
    command = [sys.executable, str(HERE / "bare_ddp.py"), "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    told = json.loads(done.stdout.splitlines()[-1])
    return told["single"] / told["ddp"], (told["ddp"] - told["noop"]) / told["ddp"]


def main(rounds: int) -> int:
    """Interleave both, print every round and the medians; 0 when they agree."""
    pairs = []
    with Ranks(2, timeout=300, echo=False) as ranks:
        for number in range(rounds):
            both = (ours(ranks), bare()) if number % 2 else (bare(), ours(ranks))[::-1]
            pairs.append(both)
            (us, our_share), (them, their_share) = both
            print(
                f"round {number + 1}: speed-up pardemo {us:.3f}, bare {them:.3f}; "
                f"exposed pardemo {our_share:.1%}, bare {their_share:.1%}",
                flush=True,
            )
    speed = statistics.median(us / them for (us, _), (them, _) in pairs) - 1
    share = statistics.median(our - their for (_, our), (_, their) in pairs)
    print(f"median: speed-up differs by {speed:+.1%}, exposed share by {100 * share:+.1f} points")
    return int(abs(speed) > SPEEDUP or abs(share) > SHARE)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5))
