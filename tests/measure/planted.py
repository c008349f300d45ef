"""By hand: training scripts with a planted cause, and healthy ones, that diagnose() must name.

    python tests/measure/planted.py [ROUNDS] [PART OF A NAME]

Prints a line for each script: what was planted, what was named at which share of the step, and at
the end how many were named, how many first. Of a healthy script nothing may be named. No library
call is told what was planted. The scripts are plain DDP and FSDP, as a learner writes them.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Dataset

from pardemo.measure import diagnose, observe

STEPS = 14


def mlp(width: int, depth: int = 3) -> nn.Module:
    return nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())])


def conv(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (3, 16, 16)), nn.Conv2d(3, width, 3, padding=1), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(width * 256, 10),
    )  # fmt: skip


def attention(width: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
    return nn.Sequential(
        nn.Unflatten(1, (16, width)), nn.TransformerEncoder(layer, 2), nn.Flatten()
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "mlp": (partial(mlp, 512), 512),
    "deep": (partial(mlp, 128, 16), 128),
    "wide": (partial(mlp, 1024, 2), 1024),
    "conv": (partial(conv, 32), 768),
    "attention": (partial(attention, 64), 1024),
}


class Samples(Dataset):
    def __init__(self, features: int, count: int, sleep_s: float) -> None:
        self.features, self.count, self.sleep_s = features, count, sleep_s

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(self.sleep_s)
        return torch.ones(self.features)


class ByRows(torch.optim.SGD):
    """An optimizer that somebody wrote as a loop over the rows of every parameter."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                for row, grad in zip(p.split(1), p.grad.split(1), strict=True):
                    row.add_(grad, alpha=-group["lr"])


def train(
    model: str, batch: int, *, threads: int = 1, microbatches: int = 1, sleep_s: float = 0.0,
    late_s: float = 0.0, more: int = 1, shard: bool = False, outside_s: float = 0.0,
    save: bool = False, losses: int = 0, by_rows: bool = False, **ddp: Any,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    make, features = MODELS[model]
    net = make()
    if shard:
        for child in net.children():
            if any(True for _ in child.parameters()):
                fully_shard(child)
        run: Any = fully_shard(net)
    else:
        run = DDP(net, **ddp)
    kind: Any = ByRows if by_rows else torch.optim.AdamW
    optimizer = kind(run.parameters(), lr=1e-4)
    mine = batch * (more if dist.get_rank() == 1 else 1)
    data: Any = [torch.ones(mine, features)] * STEPS
    if sleep_s:
        data = DataLoader(Samples(features, mine * STEPS, sleep_s), batch_size=mine)
    for inputs in data:
        for _ in range(microbatches):
            if late_s and dist.get_rank() == 1:
                time.sleep(late_s)
            value = run(inputs).pow(2).mean()
            value.backward()
        optimizer.step()
        optimizer.zero_grad()
        for _ in range(losses):
            dist.all_reduce(value.detach().clone())
        if save:
            with tempfile.TemporaryFile() as file:
                torch.save((run.state_dict(), optimizer.state_dict()), file)
                os.fsync(file.fileno())
        time.sleep(outside_s)


def lopsided(width: int, layers: tuple[int, int], batch: int) -> None:
    """A pipeline of two stages by hand, one of them longer."""
    torch.set_num_threads(1)
    me = dist.get_rank()
    stage = mlp(width, layers[me])
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.01)
    for _ in range(STEPS):
        if me == 0:
            out = stage(torch.ones(batch, width))
            dist.send(out.detach(), 1)  # moves batch * width * 4 bytes
            back = torch.empty_like(out)
            dist.recv(back, 1)
            out.backward(back)
        else:
            came = torch.empty(batch, width)
            dist.recv(came, 0)
            came.requires_grad_()
            stage(came).sum().backward()
            dist.send(came.grad, 0)
        optimizer.step()
        optimizer.zero_grad()


PLANTED: dict[str, tuple[str, Callable[[], None]]] = {
    "healthy mlp": ("", partial(train, "mlp", 512)),
    "healthy wide": ("", partial(train, "wide", 768)),
    "healthy conv": ("", partial(train, "conv", 32)),
    "healthy attention": ("", partial(train, "attention", 48)),
    "healthy sharded mlp": ("", partial(train, "mlp", 2048, shard=True)),
    "tiny batch mlp 1": ("tiny batch", partial(train, "mlp", 1)),
    "tiny batch mlp 8": ("tiny batch", partial(train, "mlp", 8)),
    "tiny batch wide 4": ("tiny batch", partial(train, "wide", 4)),
    "tiny batch conv 1": ("tiny batch", partial(train, "conv", 1)),
    "tiny batch attention 1": ("tiny batch", partial(train, "attention", 1)),
    "tiny batch sharded": ("tiny batch", partial(train, "mlp", 2, shard=True)),
    "threads mlp": ("oversubscribed threads", partial(train, "mlp", 256, threads=4)),
    "threads conv": ("oversubscribed threads", partial(train, "conv", 16, threads=3)),
    "no_sync mlp": ("no_sync forgotten", partial(train, "mlp", 128, microbatches=4)),
    "no_sync attention": ("no_sync forgotten", partial(train, "attention", 8, microbatches=3)),
    "late mlp": ("slow rank", partial(train, "mlp", 256, late_s=0.03)),
    "late conv": ("slow rank", partial(train, "conv", 16, late_s=0.05)),
    "more samples": ("slow rank", partial(train, "mlp", 256, more=3)),
    "more samples attention": ("slow rank", partial(train, "attention", 24, more=2)),
    "starved mlp": ("starved DataLoader", partial(train, "mlp", 16, sleep_s=0.002)),
    "starved conv": ("starved DataLoader", partial(train, "conv", 16, sleep_s=0.004)),
    "unused mlp": (
        "find_unused_parameters", partial(train, "mlp", 256, find_unused_parameters=True)),
    "unused attention": (
        "find_unused_parameters", partial(train, "attention", 16, find_unused_parameters=True)),
    "crumbs deep": ("many tiny buckets", partial(train, "deep", 128, bucket_cap_mb=0.01)),
    "crumbs attention": ("many tiny buckets", partial(train, "attention", 8, bucket_cap_mb=0.01)),
    "huge bucket": ("one huge bucket", partial(train, "wide", 64, bucket_cap_mb=1000)),
    "pipeline 1 and 4": ("imbalanced pipeline", partial(lopsided, 512, (1, 4), 256)),
    "pipeline 5 and 2": ("imbalanced pipeline", partial(lopsided, 512, (5, 2), 256)),
    "saving": ("saving in every step", partial(train, "wide", 256, save=True)),
    "evaluating": ("work outside of training", partial(train, "mlp", 256, outside_s=0.02)),
    "losses": ("many small collectives", partial(train, "mlp", 256, losses=12)),
    "by rows": ("slow optimizer", partial(train, "mlp", 128, by_rows=True)),
}  # fmt: skip


def main(rounds: int, part: str) -> None:
    named = first = tried = 0
    for _ in range(rounds):
        for name, (planted, script) in PLANTED.items():
            if part not in name:
                continue
            found = diagnose(observe(script, nprocs=2, timeout=120))
            right = planted in found.causes if planted else not found.causes
            named, tried = named + right, tried + 1
            first += right and found.causes[:1] in ([planted], [])
            said = ", ".join(f"{f.cause} {f.lost_s / found.step_s:.0%}" for f in found.findings)
            mark = "ok   " if right else "WRONG"
            print(f"{mark} {name:24} {found.step_s * 1e3:7.1f} ms  {said or 'nothing'}", flush=True)
    print(f"{named} of {tried} named, or rightly nothing; {first} of them first")


if __name__ == "__main__":
    given = sys.argv[1:]
    rounds = int(given.pop(0)) if given and given[0].isdigit() else 1
    main(rounds, given[0] if given else "")
