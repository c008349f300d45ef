"""quiet(): collectives that move nothing, so that what they cost can be seen by their absence.

Inside the context every process group's backend is replaced by torch's fake one, which returns at
once (an all-gather still copies the rank's own part). The swap costs microseconds and nothing per
operator. Results are wrong, on purpose; nothing that was learnt inside may be kept.
DDP's reducer, in C++, wants its result back from the backend: `hush` gives it a hook instead.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup
from torch.nn.parallel import DistributedDataParallel

_TYPES = dist.ProcessGroup.BackendType


@contextlib.contextmanager
def quiet(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Within, collectives of `group` (all groups by default) return at once and move nothing.

    Call it on every rank of the group. Wrap steps that have already run for real at least once:
    set-up exchanges (pipeline shapes, DDP's bucket order) need true answers.
    """
    groups = [group] if group is not None else list(dist.distributed_c10d._world.pg_map)
    undo = [_silence(g) for g in groups if isinstance(g, dist.ProcessGroup)]
    try:
        yield
    finally:
        for restore in undo:
            restore()


def _silence(group: Any) -> Callable[[], None]:
    """Put the fake backend in; return the function that puts the real one back."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind)
    real = group._get_backend(device)
    fake = _fake(group.rank(), group.size())
    known = {"gloo": _TYPES.GLOO, "nccl": _TYPES.NCCL}
    if real.name() not in known:
        raise RuntimeError(f"quiet() can silence gloo and nccl, not {real.name()!r}")
    group._register_backend(device, _TYPES.CUSTOM, fake)
    return lambda: group._register_backend(device, known[real.name()], real)


@functools.cache
def _fake(rank: int, size: int) -> Any:
    """One for all groups of this size: it keeps nothing."""
    return FakeProcessGroup._create_internal(rank, size)


def hush(module: DistributedDataParallel) -> None:
    """Give this DDP module a hook that hands every bucket back as it is, for good.

    A module that already has a Python hook is left alone: its collectives are silenced by quiet().
    """
    if not module._comm_hooks:
        module.register_comm_hook(None, _keep)


def _keep(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


_keep.__annotations__.clear()  # DDP compares them with types, and here they are text


@contextlib.contextmanager
def finding_ddp() -> Iterator[list[DistributedDataParallel]]:
    """Collect the DDP modules that are built within."""
    found: list[DistributedDataParallel] = []
    original = DistributedDataParallel.__init__

    def build(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        found.append(self)

    DistributedDataParallel.__init__ = build  # type: ignore[method-assign]
    try:
        yield found
    finally:
        DistributedDataParallel.__init__ = original  # type: ignore[method-assign]
