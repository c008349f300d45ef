"""By hand, on a quiet machine: pardemo's speed-up and exposed transfer beside a bare loop's.

    python tests/suite/beside_bare.py [ROUNDS]

Every round runs, in shuffled order and in the same two processes, the loops of bare_ddp.py, which
knows nothing of pardemo, and pardemo's own samples of the same model: one process, DDP, and DDP
without its transfer (a hook that sends nothing there, the silenced step of decompose() here).
A bare time is that of six steps in a row, on the slowest rank; pardemo's is the median of as many
steps in samples as compare() takes them. Prints the medians over rounds, the ratio of both
speed-ups and the difference of the lost shares with their 95 % intervals, and exits with 1 where
an interval excludes a difference of 2 %, or of two points.
"""

from __future__ import annotations

import random
import sys

import bare_ddp
import numpy as np
import torch
import torch.distributed as dist

from pardemo.launch import launch
from pardemo.measure import Case, inside
from pardemo.measure.anatomy import _silenced
from pardemo.measure.rounds import taking
from pardemo.suite.inside import Maker
from pardemo.workloads import Workload, sgd

NAMES = ("single", "ddp", "noop")
TOLERANCE = 0.02


def make_model(seed: int) -> torch.nn.Module:
    return bare_ddp.model()


def make_batch(size: int, step: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return bare_ddp.batch(size)


def optimizer(parameters: object) -> torch.optim.Optimizer:
    return sgd(parameters, lr=0.01)  # type: ignore[arg-type]


def cases() -> dict[str, Case]:
    """The same three as the bare loops, as pardemo measures them."""
    loss = torch.nn.functional.cross_entropy
    work = Workload("bare", make_model, make_batch, loss, optimizer, bare_ddp.BATCH)
    ddp = Maker("ddp", work, bare_ddp.BATCH)
    return {
        "single": Case(Maker("single", work, bare_ddp.BATCH), ranks=1),
        "ddp": Case(ddp, ranks=2),
        "noop": Case(_silenced(ddp), ranks=2),
    }


def measure(rounds: int) -> dict[str, list[float]]:
    """On every rank: the seconds of a step per round, of both harnesses."""
    torch.set_num_threads(1)
    steps = bare_ddp.steps(dist.get_rank(), 2)
    plans = chosen(inside.prepare("beside", cases(), bare_ddp.WARM, True))
    order = random.Random(0)
    both = [(who, name) for who in ("pardemo", "bare") for name in NAMES]
    found: dict[str, list[float]] = {f"{who} {name}": [] for who, name in both}
    for _ in range(rounds):
        for who, name in order.sample(both, len(both)):
            dist.barrier()
            if who == "bare":
                took = [bare_ddp.block(steps, name, dist.get_rank())]
            else:
                taken = inside.run_round("beside", [name], plans, bare_ddp.WARM).get(name)
                took = taken.timed.wall_s if taken else [0.0] * plans[name].samples
            slowest = torch.tensor(took, dtype=torch.float64)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            found[f"{who} {name}"].append(float(np.median(slowest)))
    inside.finish("beside")
    return found


def chosen(warm: dict[str, inside.Raw]) -> dict[str, inside.Taking]:
    """As many steps of each as in a bare block, in samples as compare() takes them."""
    plans = {}
    for name in NAMES:
        slowest = torch.tensor(max(warm[name].wall_s) if name in warm else 0.0)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        steps = taking(float(slowest)).steps
        plans[name] = inside.Taking(-(-bare_ddp.STEPS // steps), steps)
    return plans


def main(rounds: int) -> int:
    """Measure, print, judge."""
    times = {k: np.array(v) for k, v in launch(measure, rounds, nprocs=2, timeout=3000)[0].items()}
    for name, found in times.items():
        print(f"{name:16} {np.median(found) * 1e3:7.3f} ms")

    def differ(pick: np.ndarray) -> tuple[float, float]:
        mid = {name: float(np.median(found[pick])) for name, found in times.items()}
        us, them = (mid[f"{who} single"] / mid[f"{who} ddp"] for who in ("pardemo", "bare"))
        ours, theirs = (1 - mid[f"{who} noop"] / mid[f"{who} ddp"] for who in ("pardemo", "bare"))
        return us / them - 1, ours - theirs

    rng = np.random.default_rng(0)
    resampled = np.array([differ(rng.integers(0, rounds, rounds)) for _ in range(2000)])
    worst = 0
    for what, value, drawn in zip(
        ("speed-up", "lost share"), differ(np.arange(rounds)), resampled.T, strict=True
    ):
        lo, hi = np.percentile(drawn, (2.5, 97.5))
        print(f"{what} differs by {value:+.1%} (95 % interval {lo:+.1%} to {hi:+.1%})")
        worst |= int(lo > TOLERANCE or hi < -TOLERANCE)
    return worst


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 150))
