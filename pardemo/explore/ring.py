"""Explorer of the ring all-reduce: what each rank holds after every one of its 2(n-1) sends."""

from __future__ import annotations

from pardemo.explore.scene import Box, Explorer, Scene


def held(ranks: int, step: int) -> list[list[set[int]]]:
    """held[rank][chunk]: whose contributions that rank's copy of the chunk holds after `step`.

    In the first n-1 steps rank r sends its sum of chunk (r - s) mod n to rank r+1, which adds it
    (reduce-scatter); in the next n-1 the whole chunks go round (all-gather). Patarasuk 2009.
    """
    now = [[{rank} for _ in range(ranks)] for rank in range(ranks)]
    for s in range(step):
        sent = []
        for rank in range(ranks):
            chunk = (rank - s) % ranks if s < ranks - 1 else (rank + 1 - (s - ranks + 1)) % ranks
            sent.append(((rank + 1) % ranks, chunk, set(now[rank][chunk])))
        for receiver, chunk, contributions in sent:
            now[receiver][chunk] |= contributions
    return now


def draw(ranks: int, step: int) -> Scene:
    """The chunks on every rank after `step` steps of the ring (at most 2(n-1))."""
    done = min(step, 2 * (ranks - 1))
    boxes = []
    for rank, chunks in enumerate(held(ranks, done)):
        for chunk, from_ranks in enumerate(chunks):
            kind = "mine" if len(from_ranks) == 1 else "partial"
            kind = "whole" if len(from_ranks) == ranks else kind
            boxes.append(Box(rank, chunk, 1.0, kind, "+".join(map(str, sorted(from_ranks)))))
    whole = sum(box.kind == "whole" for box in boxes)
    phase = "reduce-scatter" if done < ranks else "all-gather"
    said = (
        f"After {done} of {2 * (ranks - 1)} steps ({phase if done else 'start'}): each rank has "
        f"sent {done}/{ranks} of the tensor; {whole} of {len(boxes)} chunks hold every rank's part."
    )
    numbers = {"sent": done / ranks, "whole": whole}
    lanes = tuple(f"rank {rank}" for rank in range(ranks))
    return Scene(lanes, tuple(boxes), "chunk of the tensor", said, numbers)


EXPLORER = Explorer(
    "ring",
    "Ring all-reduce, step by step",
    "Who holds whose numbers, and how much has each rank sent?",
    {"ranks": (4, 2, 3, 6, 8), "step": tuple(range(15))},
    draw,
    "Each box is a chunk and lists the ranks whose numbers its sum holds so far.",
)
