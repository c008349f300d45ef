"""By hand, on a quiet machine: what small messages cost, and who makes them wait.

    python tests/measure/small_messages.py

Prints how late a short nap ends with and without timer slack; how long a byte takes to another core
and back; and how long gloo's all-reduce of 4 KB takes while its own loop thread is scheduled in
several ways, with the processor time of that thread and the time others waited for a core.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from multiprocessing import Process
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from pardemo.launch import launch
from pardemo.machine import machine
from pardemo.measure.gate import DEFAULT_SLACK, NAP_S, NO_SLACK_NS, _timer_slack

LOOP, OTHERS = "gloo_tcp_loop", "pt_gloo_runloop"
POLICIES = {
    "as it is": (os.SCHED_OTHER, 0),
    "SCHED_BATCH": (os.SCHED_BATCH, 0),
    "SCHED_IDLE": (os.SCHED_IDLE, 0),
    "nice 10": (os.SCHED_OTHER, 10),
    "as it was": (os.SCHED_OTHER, 0),
}
TIMES = 500


def seconds(call: Callable[[], object], times: int) -> list[float]:
    """How long each of so many calls took."""
    looks = [time.perf_counter()]
    for _ in range(times):
        call()
        looks.append(time.perf_counter())
    return np.diff(looks).tolist()


def said(name: str, taken: list[float], more: str = "") -> None:
    middle, p90, p99 = np.quantile(taken, (0.5, 0.9, 0.99)) * 1e6
    print(f"{name:28} median {middle:6.0f} us, p90 {p90:6.0f}, p99 {p99:6.0f}{more}", flush=True)


def echo(inward: int, outward: int) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    while os.read(inward, 1) == b"x":
        os.write(outward, b"x")


def pipe_times() -> list[float]:
    """A byte to a process on another core and back."""
    (their_in, my_out), (my_in, their_out) = os.pipe(), os.pipe()
    child = Process(target=echo, args=(their_in, their_out))
    child.start()
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    taken = seconds(lambda: (os.write(my_out, b"x"), os.read(my_in, 1)), TIMES)
    os.sched_setaffinity(0, before)
    os.write(my_out, b"q")
    child.join()
    return taken


def threads() -> dict[str, list[tuple[int, float, float]]]:
    """Of each thread, by its name: id, milliseconds on a core, milliseconds waiting for one."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for place in Path("/proc/self/task").iterdir():
        used, waited, _ = map(int, (place / "schedstat").read_text().split())
        name = (place / "comm").read_text().strip()
        found.setdefault(name, []).append((int(place.name), used / 1e6, waited / 1e6))
    return found


def reduce_times(policy: int, niceness: int) -> tuple[list[float], float, float]:
    """(seconds of each all-reduce, ms on a core of gloo's loop, ms its workers waited for one)."""
    value = torch.ones(1024)
    seconds(lambda: dist.all_reduce(value), 50)
    for thread, *_ in threads()[LOOP]:
        os.sched_setscheduler(thread, policy, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, thread, niceness)
    before = threads()
    taken = seconds(lambda: dist.all_reduce(value), TIMES)
    after = threads()
    used = sum(x[1] for x in after[LOOP]) - sum(x[1] for x in before[LOOP])
    waited = sum(x[2] for x in after[OTHERS]) - sum(x[2] for x in before[OTHERS])
    return taken, used, waited


def main() -> None:
    print(machine().card())
    for name, slack in (("with timer slack", DEFAULT_SLACK), ("without", NO_SLACK_NS)):
        _timer_slack(slack)
        said(f"a nap of 50 us, {name}", seconds(lambda: time.sleep(NAP_S), TIMES))
    _timer_slack(DEFAULT_SLACK)
    said("a byte there and back", pipe_times())
    for name, how in POLICIES.items():
        taken, used, waited = launch(reduce_times, *how, nprocs=2, echo=False)[0]
        total = sum(taken) * 1e3
        more = f"; of {total:.0f} ms its loop ran {used:.0f}, its workers waited {waited:.0f}"
        said(f"all-reduce, loop {name}", taken, more)


if __name__ == "__main__":
    main()
