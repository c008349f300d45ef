"""How many bytes one rank puts on the wire for one collective: the wire factors.

`payload_bytes` is always the WHOLE array, as nccl-tests defines it: for an all-gather the gathered
result, for a reduce-scatter the input that every rank holds, for an all-to-all one rank's input.
"""

from __future__ import annotations

KINDS = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
    "send",
    "recv",
)
ALIASES = {"alltoall": "all_to_all", "sendrecv": "send", "allreduce": "all_reduce"}
IMPLEMENTATIONS = ("textbook", "gloo")


def kind_of(name: str) -> str:
    """The canonical name of a collective; ValueError lists the known ones."""
    name = ALIASES.get(name, name)
    if name not in KINDS:
        raise ValueError(f"unknown collective {name!r}; known: {', '.join(KINDS)}")
    return name


def wire_factor(kind: str, ranks: int, implementation: str = "textbook") -> float:
    """Bytes sent per rank / payload bytes (the busbw factor of nccl-tests).

    A broadcast's 1 is what each link of a ring carries; what one rank sends depends on its place
    (`broadcast_copies`).
    implementation="gloo" changes one entry: gloo carries out reduce_scatter as an all-reduce, so
    it sends 2(n-1)/n instead of (n-1)/n.
    """
    kind = kind_of(kind)
    if ranks < 1:
        raise ValueError(f"a group has at least 1 rank, got {ranks}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is one of {IMPLEMENTATIONS}, got {implementation!r}")
    if ranks == 1 or kind == "recv":
        return 0.0
    share = (ranks - 1) / ranks
    if kind == "all_reduce" or (kind == "reduce_scatter" and implementation == "gloo"):
        return 2 * share
    if kind in ("all_gather", "reduce_scatter", "all_to_all", "gather", "scatter"):
        return share
    return 1.0  # broadcast, reduce, send: every byte once


def wire_bytes(
    kind: str, payload_bytes: float, ranks: int, implementation: str = "textbook"
) -> float:
    """Bytes one rank sends for one collective of `payload_bytes` (the whole array)."""
    if wire_factor(kind, ranks, implementation) == 0.0:
        return 0.0
    doubled = kind_of(kind) == "all_reduce" or (
        kind_of(kind) == "reduce_scatter" and implementation == "gloo"
    )
    if kind_of(kind) in ("broadcast", "reduce", "send"):
        return float(payload_bytes)
    # multiplied before it is divided, so that whole bytes stay whole
    return (2 if doubled else 1) * (ranks - 1) * payload_bytes / ranks


def broadcast_copies(ranks: int, place: int, implementation: str = "textbook") -> int:
    """How often the rank `place` places after the root sends the array in one broadcast.

    Along a ring everybody but the last passes it on. gloo's is a binomial tree: in round i every
    rank that has it sends it 2**i places on; the root sends most, the last ranks nothing.
    """
    if not 0 <= place < ranks:
        raise ValueError(f"place {place} does not exist among {ranks} ranks")
    if implementation != "gloo":
        return int(place < ranks - 1)
    return sum(place < 2**i and place + 2**i < ranks for i in range(ranks.bit_length()))


def formula(kind: str, implementation: str = "textbook") -> str:
    """The wire factor as text, for the tables."""
    kind = kind_of(kind)
    if kind == "all_reduce" or (kind == "reduce_scatter" and implementation == "gloo"):
        return "2(n-1)/n"
    if kind in ("broadcast", "reduce", "send"):
        return "1"
    return "0" if kind == "recv" else "(n-1)/n"
