"""One rank of the doctor's 2-rank all-reduce; arguments: rank, address, port, timeout in s."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from pardemo.cluster.torchrun import die_with_parent

ELEMENTS = 1 << 20


def main() -> None:
    die_with_parent()
    rank, address, port, timeout = int(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])
    dist.init_process_group(
        "gloo", init_method=f"tcp://{address}:{port}", rank=rank, world_size=2,
        timeout=timedelta(seconds=timeout),
    )  # fmt: skip
    tensor = torch.full((ELEMENTS,), float(rank + 1))
    dist.all_reduce(tensor)  # moves 2(n-1)/n * 4.2 MB: opens the connections too
    began = time.perf_counter()
    dist.all_reduce(tensor)  # moves 2(n-1)/n * 4.2 MB
    elapsed_s = time.perf_counter() - began
    if not bool((tensor == 6.0).all()):
        raise SystemExit(f"a sum over 2 ranks came out as {tensor[0].item()}, not 6")
    rate = 4 * ELEMENTS / elapsed_s / 1e6
    dist.destroy_process_group()
    print(f"{4 * ELEMENTS / 1e6:.1f} MB in {elapsed_s * 1e3:.0f} ms ({rate:,.0f} MB/s)")


if __name__ == "__main__":
    main()
