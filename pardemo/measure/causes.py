"""The causes that diagnose() knows: the sign of each, its remedy, and what would be left without.

Time on all ranks points to the script, time on one rank to that rank. Each check sees the parts of
a step after what was found before it has been taken off, so that nothing is explained twice.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pardemo.measure import causes_sent
from pardemo.measure.ledger import Floats, Parts, Suspect
from pardemo.measure.observe import Run
from pardemo.measure.timing import milliseconds

UNEVEN = 1.25  # own work of the slowest rank over the median rank's
APART = 1.1  # a slow rank's fast steps over the others' slow ones
STARVED = 0.10  # share of a step spent waiting for data
SAVING = 0.03  # share of a step in torch.save
OUTSIDE = 0.15  # share of a step that is neither forward, backward, optimizer nor waiting
SLOW_UPDATE = 3.0  # an optimizer's time over AdamW's on the same parameters

Check = Callable[[Run, Parts], Suspect | None]


def suspects(run: Run) -> list[Suspect]:
    """Every cause whose sign is there, the most specific first."""
    parts, found = Parts.of(run), []
    for check in CHECKS:
        suspect = check(run, parts)
        if suspect is not None:
            found.append(suspect)
            suspect.remove(parts)
    return found


def _oversubscribed(run: Run, parts: Parts) -> Suspect | None:
    threads = sum(record.threads for record in run.records)
    if threads <= run.cores:
        return None
    queued = float(run.median("queued_s").mean())
    one = max(1, run.cores // len(run.records))

    def remove(left: Parts) -> None:
        left.pushed = np.zeros_like(left.pushed)

    return Suspect(
        "oversubscribed threads",
        f"{len(run.records)} ranks x {run.records[0].threads} threads = {threads} on {run.cores} "
        f"cores; each rank's thread waited {milliseconds(queued)} per step for a core",
        f"give each rank {one} thread{'s' if one > 1 else ''} (torch.set_num_threads({one}), or "
        f"OMP_NUM_THREADS={one}), and no more ranks than cores",
        remove,
        certain=True,
    )


def _starved(run: Run, parts: Parts) -> Suspect | None:
    data = run.median("data_s")
    worst = int(data.argmax())
    if data[worst] < STARVED * run.step_s:
        return None

    def remove(left: Parts) -> None:
        left.data = np.zeros_like(left.data)

    return Suspect(
        "starved DataLoader",
        f"rank {worst} waited {milliseconds(float(data[worst]))} of {milliseconds(run.step_s)} for "
        "its next batch",
        "prepare batches beside the training: num_workers >= 1 with persistent_workers=True and "
        "prefetch_factor, or do the costly transformation once, ahead",
        remove,
    )


def _saving(run: Run, parts: Parts) -> Suspect | None:
    saved = run.table("saved_s")
    by_rank = np.median(saved, axis=1)
    worst = int(by_rank.argmax())
    if by_rank[worst] < SAVING * run.step_s:
        return None
    return Suspect(
        "saving in every step",
        f"rank {worst} spent {milliseconds(float(by_rank[worst]))} of "
        f"{milliseconds(run.step_s)} in torch.save, in most steps",
        "save less often, or beside the training: copy the state, and write it in a thread "
        "(torch.distributed.checkpoint.async_save)",
        _less(saved),
    )


def _uneven(run: Run, parts: Parts) -> Suspect | None:
    """A rank that works longer than the others: by its own doing, or because it had no core."""
    if len(run.records) < 2:
        return None
    waits = run.median("communication_s")
    ready = np.median(parts.work + parts.pushed + parts.data, axis=1)
    for works in (parts.work, parts.work + parts.pushed):  # what is its own doing goes first
        by_rank = np.median(works, axis=1)
        slow = int(by_rank.argmax())
        usual = np.median(np.delete(works, slow, axis=0), axis=0)
        longer = works[slow] - usual
        others, lost = float(np.median(np.delete(by_rank, slow))), float(np.median(longer))
        if waits[slow] > waits.min() + 0.5 * lost + ready.max() - ready[slow]:
            continue  # it waits itself: the work is uneven, and nobody waits for this rank
        steady = np.quantile(longer, 0.25) >= 0.05 * run.step_s  # not now this rank, now that
        steady &= np.quantile(works[slow], 0.25) >= APART * np.quantile(usual, 0.75)
        if by_rank[slow] >= UNEVEN * others and steady:
            return _slow_rank(run, parts, works, slow, others)
    return None


def _slow_rank(run: Run, parts: Parts, works: Floats, slow: int, others: float) -> Suspect:
    """The suspect for the rank that the others wait for."""
    by_rank = float(np.median(works[slow]))
    seen = f"rank {slow} works {milliseconds(by_rank)} per step, the others "
    seen += f"{milliseconds(others)}, and they wait for it{_where(run, slow, by_rank - others)}"
    if causes_sent.has_point_to_point(run):
        return Suspect(
            "imbalanced pipeline",
            f"{seen}: stage {slow} is the longest, and every microbatch passes through it",
            f"move layers out of stage {slow}: cut by measured time, not by number of layers",
            lambda left: _level(left, float(len(run.records))),
        )

    def remove(left: Parts) -> None:
        usual = np.median(np.delete(left.work, slow, axis=0), axis=0)
        left.work[slow] = np.minimum(left.work[slow], usual)
        usual = np.median(np.delete(left.pushed, slow, axis=0), axis=0)
        left.pushed[slow] = np.minimum(left.pushed[slow], usual)

    return Suspect(
        "slow rank",
        seen,
        f"look at rank {slow} alone: more or longer samples, logging or saving on that rank only, "
        "another program on its device",
        remove,
    )


def _level(left: Parts, ranks: float) -> None:
    """All stages work alike: together as long as before."""
    left.work = np.broadcast_to(left.work.sum(axis=0) / ranks, left.work.shape).copy()


def _where(run: Run, slow: int, lost: float) -> str:
    """What else tells this rank from the others: its samples, its queue, the part of its step."""

    def longer(what: str) -> float:
        values = run.median(what)
        return float(values[slow] - np.median(np.delete(values, slow)))

    said = ""
    samples = run.median("samples")
    if longer("samples") > 0:
        said += f"; it has {samples[slow]:.0f} samples in a forward, another {samples.min():.0f}"
    if longer("pushed_s") > 0.3 * lost:
        said += f"; it was ready without a core for {milliseconds(longer('pushed_s'))} longer"
        said += ": others run there"
    parts = {
        "backward": longer("backward_s"),
        "optimizer": longer("optimizer_s"),
        "torch.save": longer("saved_s"),
        "the script outside of forward, backward and optimizer": longer("outside_s"),
    }
    parts["forward"] = longer("own_s") - sum(parts.values())
    name, most = max(parts.items(), key=lambda item: item[1])
    if any(run.median("backward_s")) and most > 0.5 * lost:
        said += f"; {milliseconds(most)} of it in {name}"
    return said


def _slow_optimizer(run: Run, parts: Parts) -> Suspect | None:
    tried = [record.adamw for record in run.records]
    if any(one is None for one in tried):
        return None
    usual = np.array([[one.seconds] for one in tried if one is not None])
    taken = run.table("optimizer_s")
    more = np.maximum(0.0, taken - usual)
    by_rank = np.median(taken, axis=1)
    least = int(by_rank.argmin())
    if by_rank[least] < SLOW_UPDATE * usual[least, 0]:
        return None
    return Suspect(
        "slow optimizer",
        f"the optimizer takes {milliseconds(float(by_rank[least]))} per step; torch.optim.AdamW, "
        f"tried on parameters like these, takes {milliseconds(float(usual[least, 0]))}",
        "update whole tensors at once (foreach=True or fused=True), not in a loop over their parts",
        _less(more),
    )


def _outside(run: Run, parts: Parts) -> Suspect | None:
    everywhere = run.table("outside_s").min(axis=0)
    taken = float(np.median(everywhere))
    if taken < OUTSIDE * run.step_s:
        return None
    return Suspect(
        "work outside of training",
        f"{milliseconds(taken)} of {milliseconds(run.step_s)} pass on every rank between an "
        "optimizer step and the next forward, or between backward and optimizer, and neither in a "
        "DataLoader nor in communication",
        "evaluate, log and check every so many steps only; make batches in a DataLoader with "
        "workers",
        _less(everywhere),
    )


def _less(taken: Floats) -> Callable[[Parts], None]:
    def remove(left: Parts) -> None:
        left.work = np.maximum(0.0, left.work - taken)

    return remove


CHECKS: tuple[Check, ...] = (
    _oversubscribed, _starved, _saving, _uneven, _slow_optimizer, _outside, *causes_sent.CHECKS,
)  # fmt: skip
