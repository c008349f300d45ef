"""A witness without pardemo: one process, DDP, and DDP with a hook that sends nothing, by hand.

    python tests/suite/bare_ddp.py 2

Plain torch and multiprocessing, as anyone would write it: a look at the clock, steps in a row,
another look. Prints one JSON line with the median over rounds of the seconds of a step of each, all
interleaved in shuffled rounds; a step's time is that of the slowest rank. Like pardemo's DDP it
asks for the mean loss of all ranks in every step: one number, which costs a message's latency.
"""

import json
import random
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

WIDTH, BATCH, ROUNDS, STEPS, WARM = 1024, 512, 40, 6, 2


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
    )


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(size, 64), torch.randint(10, (size,))


def send_nothing(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def trainer(net: nn.Module, share: int, log: bool = False) -> object:
    """A step of training; with `log` it ends with the mean of the ranks' losses."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    inputs, targets = batch(share)

    def step() -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(inputs), targets)
        loss.backward()
        optimizer.step()
        if log:
            dist.all_reduce(loss.detach())

    return step


def steps(rank: int, ranks: int) -> dict[str, object]:
    """One training step of each kind, on this rank."""
    plain, silent = DistributedDataParallel(model()), DistributedDataParallel(model())
    silent.register_comm_hook(None, send_nothing)
    return {
        "single": trainer(model(), BATCH),
        "ddp": trainer(plain, BATCH // ranks, log=True),
        "noop": trainer(silent, BATCH // ranks),
    }


def block(steps: dict[str, object], name: str, rank: int) -> float:
    """Seconds of a step, in a row of them after some to warm up; 0 where a rank sits out."""
    if name == "single" and rank > 0:
        return 0.0
    for _ in range(WARM):
        steps[name]()  # type: ignore[operator]
    start = time.perf_counter()
    for _ in range(STEPS):
        steps[name]()  # type: ignore[operator]
    return (time.perf_counter() - start) / STEPS


def work(rank: int, ranks: int, meeting: str, answer: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    made = steps(rank, ranks)
    times: dict[str, list[float]] = {name: [] for name in made}
    order = random.Random(0)
    for _ in range(ROUNDS):
        for name in order.sample(list(made), len(made)):
            dist.barrier()
            slowest = torch.tensor(block(made, name, rank), dtype=torch.float64)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            times[name].append(float(slowest))
    if rank == 0:
        with open(answer, "w") as out:
            medians = {name: float(torch.tensor(t).median()) for name, t in times.items()}
            json.dump(medians, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (count, f"{folder}/meeting", f"{folder}/answer"), nprocs=count)
        with open(f"{folder}/answer") as found:
            print(found.read())
