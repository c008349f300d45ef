"""diagnose(run): why more devices made it slower. Each cause with its evidence and a remedy.

A cause is named only where its own sign was seen; the seconds it costs per step are what its sign
accounts for, so several causes may overlap. The order is by cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pardemo.measure.instruments import Wrapper
from pardemo.measure.observe import Run
from pardemo.measure.timing import milliseconds

UNEVEN = 1.25  # own work of the slowest rank over the median rank's
STARVED = 0.10  # share of a step spent waiting for data
EXPOSED = 0.15  # share of a step spent in communication that is worth a word
TINY_BUCKET = 256 * 1024  # bytes: below, an all-reduce is mostly latency
DEFAULT_CAP = 25 * 1024 * 1024  # DDP's bucket_cap_mb
FASTER = 2.0  # how much faster another network must be to be worth a word


@dataclass(frozen=True)
class Finding:
    """One cause of lost time: seconds per step it accounts for, what was seen, what to do."""

    cause: str
    lost_s: float
    evidence: str
    remedy: str

    def __repr__(self) -> str:
        cost = f"about {milliseconds(self.lost_s)} per step" if self.lost_s > 0 else "cost not seen"
        return f"{self.cause} ({cost})\n    seen: {self.evidence}\n    remedy: {self.remedy}"


@dataclass(frozen=True)
class Diagnosis:
    """All findings, the costliest first; empty where nothing stood out."""

    findings: tuple[Finding, ...]
    step_s: float
    load: tuple[str, ...] = ()

    @property
    def causes(self) -> list[str]:
        """The names, the costliest first."""
        return [finding.cause for finding in self.findings]

    def __bool__(self) -> bool:
        return bool(self.findings)

    def __repr__(self) -> str:
        lines = [f"a step takes {milliseconds(self.step_s)}"]
        lines += [f"{i}. {finding!r}" for i, finding in enumerate(self.findings, 1)]
        if not self.findings:
            lines.append("nothing stands out: what is left is computation and its transfer")
        lines += [f"not to be trusted: {said}" for said in self.load]
        return "\n".join(lines)


def diagnose(run: Run) -> Diagnosis:
    """Attribute the time of an observed run to its causes."""
    found = [finding for check in CHECKS if (finding := check(run)) is not None]
    found.sort(key=lambda finding: -finding.lost_s)
    return Diagnosis(tuple(found), run.step_s, run.load)


def _oversubscribed(run: Run) -> Finding | None:
    threads = sum(record.threads for record in run.records)
    if threads <= run.cores:
        return None
    queued = float(run.median("queued_s").mean())
    one = max(1, run.cores // len(run.records))
    return Finding(
        "oversubscribed threads",
        queued,
        f"{len(run.records)} ranks x {run.records[0].threads} threads = {threads} on {run.cores} "
        f"cores; each rank's thread waited {milliseconds(queued)} per step for a core",
        f"give each rank {one} thread{'s' if one > 1 else ''} (torch.set_num_threads({one}), or "
        f"OMP_NUM_THREADS={one}), and no more ranks than cores",
    )


def _starved(run: Run) -> Finding | None:
    data = run.median("data_s")
    worst = int(data.argmax())
    if data[worst] < STARVED * run.step_s:
        return None
    return Finding(
        "starved DataLoader",
        float(data[worst]),
        f"rank {worst} waited {milliseconds(float(data[worst]))} of {milliseconds(run.step_s)} for "
        "its next batch",
        "prepare batches beside the training: num_workers >= 1 with persistent_workers=True and "
        "prefetch_factor, or do the costly transformation once, ahead",
    )


def _uneven(run: Run) -> Finding | None:
    """A rank that works longer than the others: by its own doing, or because it had no core."""
    own, waits = run.median("own_s"), run.median("communication_s")
    if len(own) < 2:
        return None
    for works in (run.median("worked_s"), own):  # what is its own doing goes first
        slow = int(works.argmax())
        others = float(np.median(np.delete(works, slow)))
        lost = float(works[slow] - others)
        if waits[slow] > waits.min() + 0.5 * lost:
            continue  # it waits itself: the work is uneven, and nobody waits for this rank
        if works[slow] >= UNEVEN * others and lost >= 0.05 * run.step_s:
            return _slow_rank(run, slow, float(works[slow]), others)
    return None


def _slow_rank(run: Run, slow: int, works: float, others: float) -> Finding:
    """The finding for the rank that the others wait for."""
    own, queued, lost = run.median("own_s"), run.median("pushed_s"), works - others
    seen = f"rank {slow} works {milliseconds(works)} per step, the others "
    seen += f"{milliseconds(others)}, and they wait for it"
    pushed = float(queued[slow] - np.median(np.delete(queued, slow)))
    if pushed > 0.3 * lost:
        seen += f"; it was ready without a core for {milliseconds(pushed)} longer: others run there"
    if _has_point_to_point(run):
        return Finding(
            "imbalanced pipeline",
            lost * (len(own) - 1) / len(own),
            f"{seen}: stage {slow} is the longest, and every microbatch passes through it",
            f"move layers out of stage {slow}: cut by measured time, not by number of layers",
        )
    return Finding(
        "slow rank",
        lost,
        seen,
        f"look at rank {slow} alone: more or longer samples, logging or saving on that rank only, "
        "another program on its device",
    )


def _no_sync(run: Run) -> Finding | None:
    backwards = int(np.median(run.table("backwards")))
    wrapper, moved = _wrapper(run), _gradients_moved(run)
    if backwards < 2 or wrapper is None or moved < 1.5 * wrapper.parameters_bytes:
        return None
    times = moved / wrapper.parameters_bytes
    transfer = _transfer(run)
    return Finding(
        "no_sync forgotten",
        transfer * (1 - 1 / times),
        f"{backwards} backward passes per optimizer step, and each sent its gradients: "
        f"{moved / 1e6:.2f} MB all-reduced per step where {wrapper.parameters_bytes / 1e6:.2f} MB "
        "are enough",
        "wrap all but the last microbatch, forward and backward, in `with ddp.no_sync():`",
    )


def _unused(run: Run) -> Finding | None:
    wrapper = _wrapper(run)
    if wrapper is None or not wrapper.find_unused_parameters or wrapper.unused:
        return None
    return Finding(
        "find_unused_parameters",
        0.0,
        "DDP walks the graph after every forward to find parameters without a gradient, and "
        "exchanges what it found; in this run every parameter got its gradient",
        "leave find_unused_parameters=False, or static_graph=True where the same ones are always "
        "unused",
    )


def _tiny_buckets(run: Run) -> Finding | None:
    sizes = _buckets(run)
    tiny = [size for size in sizes if size <= TINY_BUCKET]
    if len(tiny) < 4 or len(tiny) < 0.5 * len(sizes):
        return None
    return Finding(
        "many tiny buckets",
        _transfer(run) * len(tiny) / len(sizes),
        f"{len(sizes)} all-reduces of {np.median(sizes) / 1e3:.3g} kB (median) per backward, "
        f"{len(tiny)} of them at most {TINY_BUCKET / 1e3:.0f} kB: each pays the latency of a "
        "collective",
        "raise bucket_cap_mb (the default is 25) until the curve of time over buckets is flat",
    )


def _one_bucket(run: Run) -> Finding | None:
    sizes, transfer, wrapper = _buckets(run), _transfer(run), _wrapper(run)
    if not sizes or max(sizes) < 0.9 * sum(sizes) or wrapper is None:
        return None
    raised = wrapper.cap_bytes > DEFAULT_CAP
    if sum(sizes) < (1_000_000 if raised else 4_000_000) or transfer < EXPOSED * run.step_s:
        return None
    if not raised and transfer > run.median("own_s").max():
        return None  # nothing to hide it behind: the batch is tiny, whatever the buckets
    return Finding(
        "one huge bucket",
        transfer,
        f"one bucket of {max(sizes) / 1e6:.3g} MB of {sum(sizes) / 1e6:.3g} MB: it is sent when "
        "the last gradient is there, so nothing of it can be hidden behind the backward",
        "lower bucket_cap_mb so that the first buckets leave while the backward still runs",
    )


def _tiny_batch(run: Run) -> Finding | None:
    own, transfer = float(run.median("own_s").max()), _transfer(run)
    known = (_no_sync, _tiny_buckets, _wrong_interface)
    if transfer < 0.5 * own or transfer < 0.25 * run.step_s or any(check(run) for check in known):
        return None
    if _has_point_to_point(run):  # its waiting is a bubble, and more samples are not the remedy
        return None
    samples = run.records[0].samples
    return Finding(
        "tiny batch",
        transfer,
        f"a rank works {milliseconds(own)} on its {samples} samples and then communicates for "
        f"{milliseconds(transfer)}: the transfer does not depend on the batch, the work does",
        "more samples per rank and step; where memory is short, accumulate microbatches under "
        "no_sync; otherwise use fewer devices",
    )


def _wrong_interface(run: Run) -> Finding | None:
    roads = run.records[0].roads
    used = max(roads, key=lambda road: road.sent_bytes, default=None)
    best = max(roads, key=lambda road: road.bytes_per_s, default=None)
    if used is None or best is None or not used.sent_bytes or not used.bytes_per_s:
        return None
    if best.bytes_per_s < FASTER * used.bytes_per_s:
        return None
    return Finding(
        "wrong network interface",
        float(run.median("communication_s").min()) * (1 - used.bytes_per_s / best.bytes_per_s),
        f"the ranks' bytes went over {used.interface} ({used.address}), which carried "
        f"{used.bytes_per_s / 1e6:.3g} MB/s when it was tried; {best.interface} joins the same "
        f"machines and carried {best.bytes_per_s / 1e6:.3g} MB/s",
        f"set GLOO_SOCKET_IFNAME={best.interface} (for NCCL, NCCL_SOCKET_IFNAME) on every node "
        "before the process groups are made",
    )


Check = Callable[[Run], Finding | None]
CHECKS: tuple[Check, ...] = (
    _oversubscribed, _starved, _uneven, _no_sync, _unused, _tiny_buckets, _one_bucket, _tiny_batch,
    _wrong_interface,
)  # fmt: skip


def _transfer(run: Run) -> float:
    """Communication of the least waiting rank: the others also wait for slower ranks in it."""
    return float(run.median("communication_s").min())


def _wrapper(run: Run) -> Wrapper | None:
    """The largest DDP module of rank 0."""
    return max(run.records[0].wrappers, key=lambda w: w.parameters_bytes, default=None)


def _buckets(run: Run) -> list[int]:
    wrapper = _wrapper(run)
    return list(wrapper.buckets_bytes) if wrapper is not None else []


def _gradients_moved(run: Run) -> int:
    traffic = run.records[0].traffic
    return traffic.payload_bytes(kind="all_reduce", phase="backward") if traffic else 0


def _has_point_to_point(run: Run) -> bool:
    return any(r.traffic is not None and r.traffic.calls(kind="send") for r in run.records)
