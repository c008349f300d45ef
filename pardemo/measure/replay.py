"""The communication of a step by itself: the same calls, sizes and groups, and no computation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pardemo.measure import volumes
from pardemo.measure.volumes import Call


def replay(calls: list[Call]) -> Callable[[], None]:
    """A step that issues these calls at once, in order, and waits for all (call on every rank).

    Buffers are float32 of the recorded sizes, made once, outside the step.
    """
    groups = {volumes.group_name(g): g for g in dist.distributed_c10d._world.pg_map}
    issues = [_issue(call, groups[call.group]) for call in calls if call.kind in _MAKERS]

    def step() -> None:
        works = [issue() for issue in issues]
        for work in works:
            if work is not None:
                work.wait()

    return step


def _issue(call: Call, group: Any) -> Callable[[], Any]:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    count = max(call.ranks, -(-call.payload_bytes // 4 // call.ranks) * call.ranks)
    return _MAKERS[call.kind](torch.zeros(count, device=kind), call, group)


def _all_reduce(whole: torch.Tensor, call: Call, group: Any) -> Callable[[], Any]:
    return lambda: dist.all_reduce(whole, group=group, async_op=True)  # moves 2(n-1)/n S


def _all_gather(whole: torch.Tensor, call: Call, group: Any) -> Callable[[], Any]:
    part = whole[: len(whole) // call.ranks].clone()
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    return lambda: gather(whole, part, group=group, async_op=True)  # moves (n-1)/n S


def _reduce_scatter(whole: torch.Tensor, call: Call, group: Any) -> Callable[[], Any]:
    part = whole[: len(whole) // call.ranks].clone()
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    return lambda: scatter(part, whole, group=group, async_op=True)  # moves (n-1)/n S


def _all_to_all(whole: torch.Tensor, call: Call, group: Any) -> Callable[[], Any]:
    out = torch.empty_like(whole)
    return lambda: dist.all_to_all_single(out, whole, group=group, async_op=True)  # (n-1)/n S


def _broadcast(whole: torch.Tensor, call: Call, group: Any) -> Callable[[], Any]:
    root = dist.get_global_rank(group, max(call.peer, 0))
    return lambda: dist.broadcast(whole, root, group=group, async_op=True)  # moves S


def _reduce(whole: torch.Tensor, call: Call, group: Any) -> Callable[[], Any]:
    root = dist.get_global_rank(group, max(call.peer, 0))
    return lambda: dist.reduce(whole, root, group=group, async_op=True)  # moves S


def _send(whole: torch.Tensor, call: Call, group: Any) -> Callable[[], Any]:
    peer = dist.get_global_rank(group, call.peer)
    return lambda: dist.isend(whole, peer, group=group)  # moves S


def _recv(whole: torch.Tensor, call: Call, group: Any) -> Callable[[], Any]:
    peer = dist.get_global_rank(group, call.peer)
    return lambda: dist.irecv(whole, peer, group=group)  # moves S


_MAKERS: dict[str, Callable[[torch.Tensor, Call, Any], Callable[[], Any]]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "reduce": _reduce,
    "send": _send,
    "recv": _recv,
}
