"""Causes in what is sent. The transfer is judged last, after what is known to swell it (sent over
the wrong network, repeated, in crumbs) has been taken off.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pardemo.measure.ledger import Parts, Suspect
from pardemo.measure.observe import Run
from pardemo.measure.timing import milliseconds
from pardemo.measure.traffic import Traffic
from pardemo.measure.watched import Wrapper

EXPOSED = 0.15  # share of a step spent in communication that is worth a word
TINY_BUCKET = 256 * 1024  # bytes: below, an all-reduce is mostly latency
DEFAULT_CAP = 25 * 1024 * 1024  # DDP's bucket_cap_mb
FIRST_CAP = 1024 * 1024  # of the bucket that DDP sends first: it thinks this size worth it
FASTER = 2.0  # how much faster another network must be to be worth a word
LATENT = 0.2  # share of a transfer that is latency of buckets that one could carry
MANY = 4  # short collectives of one step that could be one
TALKS = 0.5  # transfer over work from which a batch is called tiny
HIDDEN = 0.75  # share of a backward that can hide buckets: the first must be filled before


def _wrong_interface(run: Run, parts: Parts) -> Suspect | None:
    roads = run.records[0].roads
    used = max(roads, key=lambda road: road.sent_bytes, default=None)
    best = max(roads, key=lambda road: road.bytes_per_s, default=None)
    if used is None or best is None or not used.sent_bytes or not used.bytes_per_s:
        return None
    if best.bytes_per_s < FASTER * used.bytes_per_s:
        return None
    kept = used.bytes_per_s / best.bytes_per_s

    def remove(left: Parts) -> None:
        left.gradients, left.small = kept * left.gradients, kept * left.small
        left.rest = kept * left.rest

    return Suspect(
        "wrong network interface",
        f"the ranks' bytes went over {used.interface} ({used.address}), which carried "
        f"{used.bytes_per_s / 1e6:.3g} MB/s when it was tried; {best.interface} joins the same "
        f"machines and carried {best.bytes_per_s / 1e6:.3g} MB/s",
        f"set GLOO_SOCKET_IFNAME={best.interface} (for NCCL, NCCL_SOCKET_IFNAME) on every node "
        "before the process groups are made",
        remove,
        certain=True,
    )


def _no_sync(run: Run, parts: Parts) -> Suspect | None:
    backwards = int(np.median(run.table("backwards")))
    wrappers, moved = run.records[0].wrappers, _gradients_moved(run)
    enough = sum(wrapper.parameters_bytes for wrapper in wrappers)
    if backwards < 2 or not enough or moved < 1.5 * enough:
        return None
    return Suspect(
        "no_sync forgotten",
        f"{backwards} backward passes per optimizer step, and each sent its gradients: "
        f"{moved / 1e6:.2f} MB all-reduced per step where {enough / 1e6:.2f} MB are enough",
        "wrap all but the last microbatch, forward and backward, in `with ddp.no_sync():`",
        _fewer(enough / moved),
        certain=True,
    )


def _unused(run: Run, parts: Parts) -> Suspect | None:
    wrapper = _wrapper(run)
    if wrapper is None or not wrapper.find_unused_parameters or wrapper.unused:
        return None
    searched = run.table("searched_s")
    flags = _flags(run)
    kept = 1 - _share(run, flags)

    def remove(left: Parts) -> None:
        left.work = np.maximum(0.0, left.work - searched)
        left.gradients = kept * left.gradients

    return Suspect(
        "find_unused_parameters",
        "DDP walks the graph after every forward to find parameters without a gradient "
        f"({milliseconds(float(np.median(searched)))} per step), and exchanges what it found in "
        f"{flags} more all-reduce{'s' * (flags != 1)}; in this run every parameter got its "
        "gradient",
        "leave find_unused_parameters=False, or static_graph=True where the same ones are always "
        "unused",
        remove,
        certain=True,
    )


def _tiny_buckets(run: Run, parts: Parts) -> Suspect | None:
    sizes, wrapper, wire = _buckets(run), _wrapper(run), run.records[0].wire
    tiny = [size for size in sizes if size <= TINY_BUCKET]
    if len(sizes) < MANY or wrapper is None:
        return None
    surplus = _share(run, len(sizes) - min(len(sizes), 1 + sum(sizes) // DEFAULT_CAP))
    crumbs = len(tiny) >= MANY and len(tiny) >= 0.5 * len(sizes)
    lowered = wrapper.cap_bytes < DEFAULT_CAP and np.median(sizes) <= FIRST_CAP / 2
    if not crumbs and not (lowered and wire is not None and surplus >= LATENT):
        return None
    each = f", {milliseconds(wire.latency_s)} here" if wire else ""
    return Suspect(
        "many tiny buckets",
        f"{len(sizes)} all-reduces of {np.median(sizes) / 1e3:.3g} kB (median) per backward, "
        f"{len(tiny)} of them at most {TINY_BUCKET / 1e3:.0f} kB: each pays the latency of a "
        f"collective{each}, and latencies are {surplus:.0%} of the transfer",
        "raise bucket_cap_mb (the default is 25) until the curve of time over buckets is flat",
        _fewer(1 - surplus),
        certain=crumbs,
    )


def small_collectives(run: Run, parts: Parts) -> Suspect | None:
    """Losses, norms, flags: many short collectives that the script calls itself."""
    calls = float(np.median(run.table("small_calls")[0]))
    if calls < MANY:
        return None

    def remove(left: Parts) -> None:
        left.small = left.small / calls

    return Suspect(
        "many small collectives",
        f"the script itself makes {calls:.0f} collectives of at most {TINY_BUCKET / 1e3:.0f} kB "
        f"per step, outside of forward and backward, and waits "
        f"{milliseconds(float(np.median(parts.small)))} in them",
        "one collective for all of them: add up on the device and stack the values into one "
        "tensor; of a loss or a metric, every so many steps only",
        remove,
    )


def _one_bucket(run: Run, parts: Parts) -> Suspect | None:
    sizes, wrapper = _buckets(run), _wrapper(run)
    transfer = float(np.median(parts.gradients))
    if not sizes or max(sizes) < 0.9 * sum(sizes) or wrapper is None:
        return None
    raised = wrapper.cap_bytes > DEFAULT_CAP
    if sum(sizes) < (1_000_000 if raised else 4_000_000) or transfer < EXPOSED * parts.step_s():
        return None
    if not raised and transfer > np.median(parts.work, axis=1).max():
        return None  # nothing to hide it behind: the batch is tiny, whatever the buckets
    backward = float(run.median("backward_s").max())

    def remove(left: Parts) -> None:
        hidden = np.minimum(HIDDEN * left.gradients, HIDDEN * backward)
        left.gradients = left.gradients - hidden

    return Suspect(
        "one huge bucket",
        f"one bucket of {max(sizes) / 1e6:.3g} MB of {sum(sizes) / 1e6:.3g} MB: it is sent when "
        f"the last gradient is there, so nothing of its {milliseconds(transfer)} can be hidden "
        f"behind the backward's {milliseconds(backward)}",
        "lower bucket_cap_mb so that the first buckets leave while the backward still runs (it "
        "pays where communication does not need the ranks' own cores)",
        remove,
        certain=raised,
    )


def _tiny_batch(run: Run, parts: Parts) -> Suspect | None:
    if has_point_to_point(run) or not _of_parameters(run.records[0].traffic):
        return None  # its waiting is a bubble, or grows with the batch: no remedy
    work = np.median(parts.work, axis=1)
    busy = work + np.median(parts.pushed, axis=1)  # on a busy machine the transfer is longer too
    updating = run.median("optimizer_s").min()  # it does not grow with the batch either
    own = max(0.0, float(busy.max() - updating))
    transfer = float(np.median(parts.gradients + parts.rest))
    alone = float(work.max()) + transfer  # the step without the time in which others had the core
    least = TALKS if run.records[0].wrappers or not run.records[0].traffic else 2 * TALKS
    if transfer < least * own or transfer < 0.25 * alone:
        return None
    samples = run.records[0].samples

    def remove(left: Parts) -> None:
        left.gradients, left.rest = np.zeros_like(left.gradients), np.zeros_like(left.rest)

    return Suspect(
        "tiny batch",
        f"a rank works {milliseconds(own)} on its {samples} samples, its optimizer left out, and "
        f"then communicates for {milliseconds(transfer)}: the transfer does not depend on the "
        "batch, the work does",
        "more samples per rank and step; where memory is short, accumulate microbatches under "
        "no_sync; otherwise use fewer devices",
        remove,
    )


CHECKS: tuple[Callable[[Run, Parts], Suspect | None], ...] = (
    _wrong_interface, _no_sync, _unused, _tiny_buckets, small_collectives, _one_bucket, _tiny_batch,
)  # fmt: skip


def has_point_to_point(run: Run) -> bool:
    """Whether ranks send to each other: a pipeline."""
    return any(r.traffic is not None and r.traffic.calls(kind="send") for r in run.records)


def _of_parameters(traffic: Traffic | None) -> bool:
    """Whether most bytes are parameters or gradients, so that they do not grow with the batch."""
    if traffic is None or not traffic.flows:
        return True
    sharded = traffic.payload_bytes(kind="all_gather") + traffic.payload_bytes(
        kind="reduce_scatter"
    )
    summed = traffic.payload_bytes(kind="all_reduce", phase="backward")
    activations = traffic.payload_bytes(kind="all_reduce", phase="forward")
    return sharded + summed > 2 * activations


def _fewer(kept: float) -> Callable[[Parts], None]:
    def remove(left: Parts) -> None:
        left.gradients = kept * left.gradients

    return remove


def _share(run: Run, calls: int) -> float:
    """The share of a backward's transfer that so many all-reduces' latency is."""
    sizes, wire = _buckets(run), run.records[0].wire
    everything = len(sizes) + _flags(run)
    if wire is None:
        return calls / everything if everything else 0.0
    whole = wire.seconds(everything, sum(sizes))
    return calls * wire.latency_s / whole if whole else 0.0


def _flags(run: Run) -> int:
    """All-reduces of a backward beside the buckets."""
    traffic, wrapper = run.records[0].traffic, _wrapper(run)
    if traffic is None or wrapper is None:
        return 0
    passes = max(1, round(_gradients_moved(run) / max(1, wrapper.parameters_bytes)))
    made = traffic.calls(kind="all_reduce", phase="backward")
    return max(0, round(made / passes) - len(wrapper.buckets_bytes))


def _wrapper(run: Run) -> Wrapper | None:
    """The largest DDP module of rank 0."""
    return max(run.records[0].wrappers, key=lambda w: w.parameters_bytes, default=None)


def _buckets(run: Run) -> list[int]:
    wrapper = _wrapper(run)
    return list(wrapper.buckets_bytes) if wrapper is not None else []


def _gradients_moved(run: Run) -> int:
    traffic = run.records[0].traffic
    return traffic.payload_bytes(kind="all_reduce", phase="backward") if traffic else 0
