"""Small data, real and offline: digits, text, and seeded images that can be told apart."""

from __future__ import annotations

import functools
import gzip
import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

import torch


@functools.cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Handwritten digits (scikit-learn's copy of UCI's): (1797, 64) pixels in 0..1, (1797,) labels.

    Rows keep the data set's order. Treat the tensors as read-only: they are shared.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the digits come with scikit-learn: pip install scikit-learn")
    # the file itself, because importing scikit-learn costs every rank seconds
    file = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(file, "rt") as lines:
        table = torch.tensor([[float(x) for x in line.split(",")] for line in lines])
    return table[:, :64] / 16, table[:, 64].long()


@functools.cache
def text(limit_bytes: int = 1_000_000) -> torch.Tensor:
    """The source of Python's own standard library as bytes: (n,) uint8, n <= limit_bytes.

    Top-level .py files in alphabetical order, so one Python version gives one text everywhere.
    """
    found, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        found.append(path.read_bytes())
        size += len(found[-1])
        if size >= limit_bytes:
            break
    return torch.frombuffer(bytearray(b"".join(found)[:limit_bytes]), dtype=torch.uint8)


def images(
    count: int, size: int = 32, channels: int = 3, classes: int = 10, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Synthetic images: (count, channels, size, size) floats and (count,) labels.

    Each class is a fixed smooth pattern; an image is its class's pattern plus as much noise. The
    patterns are the same for every seed, so batches of different seeds are one learnable task.
    """
    fixed = torch.Generator().manual_seed(20)
    coarse = torch.randn(classes, channels, 4, 4, generator=fixed)
    patterns = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    noise = torch.randn(count, channels, size, size, generator=generator)
    return patterns[labels] + noise, labels


def draw(count: int, available: int, step: int, seed: int) -> torch.Tensor:
    """Which samples batch number `step` holds: (count,) indices below `available`.

    The data are shuffled anew each epoch from (seed, epoch) and read in order, so a sample comes
    once per epoch, and any process computes any batch without the ones before it.
    """
    where = torch.arange(step * count, (step + 1) * count)
    chosen = torch.empty(count, dtype=torch.int64)
    for epoch in (where // available).unique().tolist():
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(available, generator=generator)
        mine = where // available == epoch
        chosen[mine] = order[where[mine] % available]
    return chosen


def windows(
    count: int, length: int, step: int, seed: int, source: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch number `step` of text: tokens (count, length) and the tokens that follow each.

    Windows start at seeded random places of `source` (default: `text()`).
    """
    source = text() if source is None else source
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(source) - length, (count, 1), generator=generator)
    chunk = source[starts + torch.arange(length + 1)].long()
    return chunk[:, :-1].contiguous(), chunk[:, 1:].contiguous()


def shard(batch: Any, rank: int, world_size: int) -> Any:
    """Rank `rank`'s part of a batch (a tensor, or a tuple of them) along dim 0.

    Parts differ by at most one sample, larger ones first; together they are the batch.
    """
    if isinstance(batch, (tuple, list)):
        return type(batch)(shard(item, rank, world_size) for item in batch)
    return torch.tensor_split(batch, world_size)[rank]
