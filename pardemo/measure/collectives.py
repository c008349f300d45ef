"""Collectives by themselves, as nccl-tests measures them: time, algbw, busbw, result verified.

S is the whole array (see volumes.py); algbw = S / t; busbw = algbw times the factor that makes it
comparable with the speed of a link: 2(n-1)/n for all-reduce, (n-1)/n for all-gather,
reduce-scatter and all-to-all, 1 for broadcast, reduce and send. Rates are base-10 GB/s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from pardemo.measure.inside import Case, Step
from pardemo.measure.rounds import Comparison, compare
from pardemo.measure.timing import Timing, milliseconds
from pardemo.measure.volumes import factor

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "reduce", "send")


class WrongResult(AssertionError):
    """A collective returned something else than arithmetic says: its time means nothing."""


@dataclass(frozen=True)
class Amid:
    """`times` pieces of computation (`piece()` makes one), and an operation with each of them.

    The operation comes after the piece and is waited for, or is under way `beside` it.
    """

    piece: Callable[[], Step]
    times: int
    beside: bool = False


@dataclass(frozen=True)
class Measured:
    """One collective at one size: `pipelined` operations were in flight at a time (1: blocking)."""

    kind: str
    ranks: int
    size_bytes: int
    dtype: str
    pipelined: int
    timing: Timing = field(repr=False)

    @property
    def time_s(self) -> float:
        """Median time of one operation."""
        return self.timing.median_s / self.pipelined

    @property
    def algbw(self) -> float:
        """Bytes per second of the whole array."""
        return self.size_bytes / self.time_s

    @property
    def busbw(self) -> float:
        """Bytes per second through the busiest link of a ring."""
        return factor(self.kind, self.ranks) * self.algbw

    def __repr__(self) -> str:
        how = "blocking" if self.pipelined == 1 else f"{self.pipelined} in flight"
        mark = "" if self.timing.status == "ok" else f" {self.timing.status.upper()}"
        return (
            f"{self.kind} of {self.size_bytes} bytes {self.dtype} over {self.ranks} ranks, {how}: "
            f"{milliseconds(self.time_s)}, algbw {self.algbw / 1e9:.3g}, "
            f"busbw {self.busbw / 1e9:.3g} GB/s{mark}"
        )


def sweep(
    kinds: Iterable[str] = KINDS,
    sizes: Iterable[int] = (4096, 65536, 1048576),
    dtypes: Iterable[str] = ("float32",),
    world_sizes: Iterable[int] = (2,),
    pipelined: Iterable[int] = (1,),
    **how: Any,
) -> list[Measured]:
    """Measure every combination in interleaved rounds; `how` goes to compare().

    The ranks begin every operation together: it is a sample by itself, however short.
    """
    plans = [
        (kind, size, dtype, ranks, depth)
        for kind in kinds
        for size in sizes
        for dtype in dtypes
        for ranks in world_sizes
        for depth in pipelined
    ]
    cases = {str(p): collective(*p) for p in plans}
    found: Comparison = compare(cases, sample_s=0, **how)
    return [Measured(k, n, s, d, p, found[str((k, s, d, n, p))]) for k, s, d, n, p in plans]


def collective(
    kind: str, size_bytes: int, dtype: str = "float32", ranks: int = 2, pipelined: int = 1,
    amid: Amid | None = None,
) -> Case:  # fmt: skip
    """A case whose step runs `pipelined` operations of this kind; verified once before timing.

    `amid` puts them among pieces of computation, as a training step does.
    """
    if kind not in KINDS:
        raise ValueError(f"no collective {kind!r}; there are {', '.join(KINDS)}")
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"no dtype {dtype!r} in torch; try 'float32' or 'bfloat16'")
    width = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    if size_bytes < ranks * width or size_bytes % (ranks * width):
        raise ValueError(
            f"{size_bytes} bytes cannot be cut into {ranks} equal parts of {dtype}: use a multiple "
            f"of {ranks * width}"
        )
    make = partial(_make, kind, size_bytes // width, getattr(torch, dtype), pipelined, amid)
    return Case(make, ranks=ranks, label=f"{kind} {size_bytes}")


def _make(
    kind: str, count: int, dtype: torch.dtype, pipelined: int, amid: Amid | None, mesh: Any
) -> Step:
    group = mesh.get_group()
    issue, out, want = _prepare(kind, count, dtype, group)
    _wait(issue())
    if want is not None and not torch.equal(out.cpu(), want):
        wrong = int((out.cpu() != want).sum())
        raise WrongResult(f"{kind} of {count} {dtype}: {wrong} of {len(want)} elements are wrong")
    if kind in ("all_reduce", "reduce"):
        out.zero_()  # so that the sum does not grow when it is repeated

    def together() -> None:
        for work in [issue() for _ in range(pipelined)]:
            _wait(work)

    return together if amid is None else _among(amid, issue, together)


def _among(amid: Amid, issue: Callable[[], Any], together: Callable[[], None]) -> Step:
    """Operations that each follow a piece of computation, or are under way beside one."""
    compute, times = amid.piece(), range(amid.times)

    def after() -> None:
        for _ in times:
            compute()
            together()

    def beside() -> None:
        for _ in times:
            work = issue()
            compute()
            _wait(work)

    return beside if amid.beside else after


def _wait(work: Any) -> None:
    if work is not None:
        work.wait()


Prepared = tuple[Callable[[], Any], torch.Tensor, torch.Tensor | None]


def _prepare(kind: str, count: int, dtype: torch.dtype, group: Any) -> Prepared:
    """(how to issue it, where the result comes, what it must be; None: this rank gets none).

    Values are small whole numbers, which every dtype adds exactly.
    """
    n, me = group.size(), group.rank()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    part = count // n
    mine = (torch.arange(count) % 7).to(dtype).to(device)
    ranks = torch.arange(n).repeat_interleave(part).to(dtype)
    first = dist.get_global_rank(group, 0)
    how: dict[str, Any] = {"group": group, "async_op": True}
    if kind in ("all_reduce", "reduce"):
        x = mine + me
        total = (mine * n + n * (n - 1) // 2).cpu()
        if kind == "all_reduce":
            return lambda: dist.all_reduce(x, **how), x, total  # moves 2(n-1)/n S
        return lambda: dist.reduce(x, first, **how), x, total if me == 0 else None  # moves S
    if kind == "broadcast":
        x = mine if me == 0 else torch.zeros_like(mine)
        return lambda: dist.broadcast(x, first, **how), x, mine.cpu()  # moves S
    if kind == "send":
        return _send(mine, n, me, group)
    out = torch.full((count,), -1).to(dtype).to(device)
    if kind == "all_gather":
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        own = torch.full((part,), me).to(dtype).to(device)
        return lambda: gather(out, own, **how), out, ranks  # moves (n-1)/n S
    if kind == "all_to_all":
        own = torch.full((count,), me).to(dtype).to(device)
        return lambda: dist.all_to_all_single(out, own, **how), out, ranks  # moves (n-1)/n S
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    short = out[:part].clone()
    want = (torch.arange(count) % 7).to(dtype)[me * part : (me + 1) * part] * n
    return lambda: scatter(short, mine, **how), short, want  # moves (n-1)/n S


def _send(mine: torch.Tensor, n: int, me: int, group: Any) -> Prepared:
    """Rank 0 sends to rank 1; other ranks only wait at the barrier."""
    if me == 0:
        to = dist.get_global_rank(group, 1)
        return lambda: dist.isend(mine, to, group=group), mine, mine.cpu()  # moves S
    if me == 1:
        came, want = torch.zeros_like(mine), mine.cpu()
        source = dist.get_global_rank(group, 0)
        return lambda: dist.irecv(came, source, group=group), came, want  # moves S
    return lambda: None, mine, mine.cpu()
