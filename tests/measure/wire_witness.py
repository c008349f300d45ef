"""Run in a fresh network namespace: what we count, beside what the loopback interface counted.

Prints one JSON line per workload: {"name", "counted_bytes", "interface_bytes"}, whole group.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from pardemo.launch import Ranks
from pardemo.measure import count

STEPS = 30


def interface_bytes() -> int:
    """Bytes the loopback interface sent since the namespace was made."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[8])
    raise LookupError("no loopback interface in /proc/net/dev")


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))


def ddp():
    net = DDP(model())
    return lambda: net(torch.ones(4, 256)).sum().backward()


def fsdp():
    net = model()
    for layer in (net[0], net[2]):
        fully_shard(layer)
    fully_shard(net)
    return lambda: net(torch.ones(4, 256)).sum().backward()


def pipeline():
    x = torch.ones(500_000)
    if dist.get_rank() == 0:
        return lambda: dist.send(x, 1)  # moves 2 MB
    return lambda: dist.recv(x, 0)  # moves 2 MB


def exchange():
    parts, out = torch.ones(500_000), torch.empty(500_000)
    return lambda: dist.all_to_all_single(out, parts)  # moves (n-1)/n * 2 MB


def gather():
    x, out = torch.ones(250_000), torch.empty(500_000)
    return lambda: dist.all_gather_into_tensor(out, x)  # moves (n-1)/n * 2 MB


def broadcast():
    x = torch.ones(500_000)
    return lambda: dist.broadcast(x, 0)  # moves 2 MB from rank 0


def reduce():
    x = torch.ones(500_000)
    return lambda: dist.reduce(x, 0)  # moves 2 MB from rank 1, 1 MB from rank 0


def prepare(make):
    import sys

    step = make()
    traffic = count(step, warmup=2)
    sys.modules["__main__"].step = step
    dist.barrier()
    return traffic


def many():
    import sys

    for _ in range(STEPS):
        sys.modules["__main__"].step()
    dist.barrier()


if __name__ == "__main__":
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with Ranks(2, timeout=100) as ranks:
        for make in (ddp, fsdp, pipeline, exchange, gather, broadcast, reduce):
            counted = sum(traffic.sent_bytes() for traffic in ranks(prepare, make)) * STEPS
            time.sleep(0.1)
            before = interface_bytes()
            ranks(many)
            seen = interface_bytes() - before
            print(json.dumps({"name": make.__name__, "counted": counted, "interface": seen}))
