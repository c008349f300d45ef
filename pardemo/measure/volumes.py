"""What each collective operator of torch carries: kind, payload, and what this rank sends.

Payload S is the WHOLE array, as nccl-tests counts it: the gathered result, the input of a
reduce-scatter, one rank's input of an all-to-all. Sent bytes follow the wire: 2(n-1)/n S for an
all-reduce, (n-1)/n S for all-gather and reduce-scatter, S for send; what an all-to-all, gather or
scatter really sends from this rank is read from its arguments. A broadcast along a ring is passed
on by all but the last rank, a reduce by all but the root; gloo does both in its own way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._pytree import tree_leaves

NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")
GLOO_REDUCE_SCATTER = (
    "gloo carries out reduce_scatter as an all-reduce, so it sends 2(n-1)/n S, not (n-1)/n S"
)
GLOO_BROADCAST = (
    "gloo broadcasts along a tree: its root sends S about log2(n) times, the last ranks nothing"
)
GLOO_REDUCE = "gloo reduces by a reduce-scatter and a gather, so its root sends (n-1)/n S, not 0"


@dataclass(frozen=True)
class Call:
    """One collective as this rank called it; `textbook_bytes` is what the usual algorithm sends."""

    kind: str
    group: str
    ranks: int
    payload_bytes: int
    sent_bytes: float
    textbook_bytes: float
    note: str = ""
    peer: int = -1  # the other rank of a send or receive, the root of a rooted collective


def bytes_of(tree: Any) -> int:
    """Bytes of all tensors in a nested structure (a DTensor counts its local shard)."""
    return sum(
        getattr(t, "_local_tensor", t).numel() * t.element_size()
        for t in tree_leaves(tree)
        if isinstance(t, torch.Tensor)
    )


def factor(kind: str, ranks: int) -> float:
    """Sent / payload for one rank of `ranks`: the busbw factors of nccl-tests."""
    if ranks == 1 or kind in ("recv", "barrier"):
        return 0.0
    share = (ranks - 1) / ranks
    return {
        "all_reduce": 2 * share,
        "all_gather": share,
        "reduce_scatter": share,
        "all_to_all": share,
        "gather": share,
        "scatter": share,
    }.get(kind, 1.0)


# operator name -> (kind, which argument's bytes count, whether they count once per rank)
_OPERATORS: dict[str, tuple[str, int, bool]] = {
    "allreduce_": ("all_reduce", 0, False),
    "allreduce_coalesced_": ("all_reduce", 0, False),
    "all_reduce": ("all_reduce", 0, False),
    "all_reduce_": ("all_reduce", 0, False),
    "all_reduce_coalesced": ("all_reduce", 0, False),
    "all_reduce_coalesced_": ("all_reduce", 0, False),
    "allgather_": ("all_gather", 0, False),
    "_allgather_base_": ("all_gather", 0, False),
    "allgather_into_tensor_coalesced_": ("all_gather", 0, False),
    "allgather_coalesced_": ("all_gather", 0, False),
    "all_gather_into_tensor": ("all_gather", 0, True),
    "all_gather_into_tensor_out": ("all_gather", 0, True),
    "all_gather_into_tensor_coalesced": ("all_gather", 0, True),
    "reduce_scatter_": ("reduce_scatter", 1, False),
    "_reduce_scatter_base_": ("reduce_scatter", 1, False),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1, False),
    "reduce_scatter_tensor": ("reduce_scatter", 0, False),
    "reduce_scatter_tensor_out": ("reduce_scatter", 0, False),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 0, False),
    "alltoall_": ("all_to_all", 1, False),
    "alltoall_base_": ("all_to_all", 1, False),
    "all_to_all_single": ("all_to_all", 0, False),
    "shard_dim_alltoall": ("all_to_all", 0, False),
    "broadcast_": ("broadcast", 0, False),
    "broadcast": ("broadcast", 0, False),
    "reduce_": ("reduce", 0, False),
    "gather_": ("gather", 1, True),
    "scatter_": ("scatter", 0, True),
    "send": ("send", 0, False),
    "isend": ("send", 0, False),
    "recv_": ("recv", 0, False),
    "irecv": ("recv", 0, False),
    "recv_any_source_": ("recv", 0, False),
    "barrier": ("barrier", -1, False),
    "monitored_barrier_": ("barrier", -1, False),
}
_QUIET = {"wait_tensor", "check_for_nan", "_wrap_tensor_autograd"}


def read(name: str, args: tuple[Any, ...]) -> list[Call]:
    """The collectives that operator `name` (without namespace) carries out with these arguments.

    Empty for operators that move nothing (waiting). LookupError for one this table does not know:
    better no count than a wrong one.
    """
    if name in _QUIET:
        return []
    if name == "batch_p2p_ops":
        return _batch(args)
    if name not in _OPERATORS:
        raise LookupError(f"unknown collective operator {name!r}: its bytes cannot be counted")
    kind, position, per_rank = _OPERATORS[name]
    group = _group_of(args)
    ranks = group.size()
    payload = 0 if position < 0 else bytes_of(args[position]) * (ranks if per_rank else 1)
    textbook = _sent(kind, name, args, group, payload)
    sent, note = textbook, ""
    if kind in _GLOO and ranks > 1 and _on_gloo(group, args):
        way, named = _GLOO[kind]
        sent = way(payload, ranks, _place(args, group))
        note = named if sent != textbook else ""
    return [Call(kind, group_name(group), ranks, payload, sent, textbook, note, _peer(args))]


def group_name(group: Any) -> str:
    """The mesh axis a group belongs to, "world" for the default group, else its own name."""
    if group == dist.group.WORLD:
        return "world"
    description = str(group.group_desc or "")
    if description.startswith("mesh_"):
        return description.removeprefix("mesh_")
    return description if description not in ("", "undefined") else str(group.group_name)


def _peer(args: tuple[Any, ...]) -> int:
    """The first whole number after the tensors: the root, source or destination; -1 without."""
    found = (a for a in args[1:] if isinstance(a, int) and not isinstance(a, bool))
    return next(found, -1)


def _sent(kind: str, name: str, args: tuple[Any, ...], group: Any, payload: int) -> float:
    ranks, me = group.size(), group.rank()
    if ranks == 1:
        return 0.0
    if kind == "all_to_all":
        return _sent_all_to_all(name, args, ranks, me, payload)
    if kind in ("gather", "scatter"):
        root = next(a for a in args[2:] if isinstance(a, int))
        if kind == "gather":
            return 0.0 if me == root else payload / ranks
        return payload * (ranks - 1) / ranks if me == root else 0.0
    if kind in ("all_reduce", "all_gather", "reduce_scatter"):
        # multiplied before it is divided, so that whole bytes stay whole
        return (2 if kind == "all_reduce" else 1) * (ranks - 1) * payload / ranks
    if kind in ("broadcast", "reduce"):
        place = _place(args, group)
        return float(payload if (place < ranks - 1 if kind == "broadcast" else place) else 0)
    return factor(kind, ranks) * payload


def _place(args: tuple[Any, ...], group: Any) -> int:
    """How many places after the root of a rooted collective this rank is."""
    return (group.rank() - _peer(args)) % group.size()


def _tree(payload: int, ranks: int, place: int) -> float:
    """A binomial tree: who has the array sends it 1, 2, 4, ... places on, as far as there are."""
    hops = [1 << i for i in range(ranks.bit_length())]
    return float(payload * sum(place < hop < ranks - place for hop in hops))


_GLOO: dict[str, tuple[Callable[[int, int, int], float], str]] = {
    "reduce_scatter": (lambda s, n, place: 2 * (n - 1) * s / n, GLOO_REDUCE_SCATTER),
    "broadcast": (_tree, GLOO_BROADCAST),
    "reduce": (lambda s, n, place: float(s) if place else (n - 1) * s / n, GLOO_REDUCE),
}


def _sent_all_to_all(name: str, args: tuple[Any, ...], ranks: int, me: int, payload: int) -> float:
    """Everything but this rank's own part, which never leaves it."""
    if name == "alltoall_":
        return float(payload - bytes_of(args[1][me]))
    splits = {"alltoall_base_": 4, "all_to_all_single": 2}.get(name)
    sizes = list(args[splits]) if splits is not None else []
    if not sizes or sum(sizes) == 0:
        return payload * (ranks - 1) / ranks
    return payload * (sum(sizes) - sizes[me]) / sum(sizes)


def _batch(args: tuple[Any, ...]) -> list[Call]:
    group = _group_of(args)
    calls = []
    for operation, peer, tensor in zip(args[0], args[1], args[3], strict=True):
        kind = "send" if "send" in operation else "recv"
        size = bytes_of(tensor)
        sent = float(size) if kind == "send" else 0.0
        calls.append(Call(kind, group_name(group), group.size(), size, sent, sent, "", peer))
    return calls


def _group_of(args: tuple[Any, ...]) -> Any:
    """The process group among an operator's arguments: boxed, or by its name."""
    for arg in args:
        if isinstance(arg, dist.ProcessGroup):
            return arg
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg)
    for arg in reversed(args):
        if isinstance(arg, str):
            return _resolve_process_group(arg)  # type: ignore[arg-type]
    raise LookupError(f"no process group among {args}")


def _on_gloo(group: Any, args: tuple[Any, ...]) -> bool:
    tensor = next(t for t in _tensors(args))
    return group._get_backend(tensor.device).name() == "gloo"


def _tensors(tree: Any) -> Iterable[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
