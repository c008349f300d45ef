"""The stop button, pressed at any moment, ends the cell, and the kernel goes on working."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch_kernels import SETUP, Kernel, a_kernel

from pardemo.launch import watch

SOAK_PRESSES = 20
# what a stop may fall into: a wait, a flood of output, a storm of reports, a start after a start
CELLS = {
    "a collective": "launch(blocks, nprocs=2)",
    "output": "launch(floods, nprocs=2)",
    "calls": "\n".join(["with Ranks(2) as ranks:", "    while True: ranks(reduce)"]),
    "starts": "while True: launch(reduce, nprocs=2)",
    "failures": "\n".join(
        [
            "while True:",
            "    try: launch(lambda: 1 / rank(), nprocs=2)",
            "    except RankFailed: pass",
        ]
    ),
    "big values": "while True: launch(torch.ones_like, torch.ones(4_000_000), nprocs=2)",
}
# A flood of output may add up to a message of 64 KiB or more, which Jupyter sends without a copy.
# From the first one on pyzmq (zmq.utils.garbage) holds a context of its own until the kernel ends:
# seven descriptors (five eventfd, two eventpoll) and three threads.
LARGE = "print('x' * 200_000)"
WORK = """
import threading
from pardemo import RankFailed
def blocks():
    print("now", flush=True)
    dist.recv(torch.ones(1), 1 - rank())
def floods():
    step = 0
    while True:
        print("x" * 2000)
        report(step=step)
        step += 1
"""


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    with a_kernel() as kernel:
        assert kernel.run(SETUP + WORK).status == "ok"
        assert kernel.run("launch(reduce, nprocs=2);").status == "ok"
        assert kernel.run(LARGE).status == "ok"
        yield kernel


def press(kernel: Kernel, cell: str, delay_s: float) -> None:
    """Start a cell, press stop `delay_s` later: it ends, its ranks too, and a launch works."""
    before = {p.pid for p in kernel.family()}
    message = kernel.send(f"print('begun', flush=True)\n{cell}")
    kernel.wait_for_output("begun", timeout=60)
    time.sleep(delay_s)
    kernel.stop()
    reply = kernel.reply(message)
    assert (reply.status, reply.ename) == ("error", "KeyboardInterrupt"), (delay_s, reply)
    assert {p.pid for p in kernel.family()} <= before, delay_s
    assert kernel.run("print(launch(reduce, nprocs=2)[0])").out == "4.0\n"


def test_a_stop_shows_no_frame_that_it_fell_into() -> None:
    """IPython cannot show one that has no line, as a frame between two lines has: the stop lost
    its name in 7 of 233 cells."""

    def waits() -> None:
        raise KeyboardInterrupt(2)

    def runs() -> None:
        with watch.interrupts_held():
            waits()

    with pytest.raises(KeyboardInterrupt) as stopped:
        runs()
    assert stopped.value.args == (2,)
    assert stopped.value.__suppress_context__
    assert "waits" not in [entry.name for entry in stopped.traceback]


@pytest.mark.parametrize("what", CELLS)
def test_a_stop_at_any_moment_ends_the_cell(kernel: Kernel, what: str) -> None:
    chance = random.Random(what)
    for _ in range(3):
        press(kernel, CELLS[what], chance.uniform(0.0, 0.5))


def descriptors(kernel: Kernel) -> list[str]:
    """What the kernel holds open, but for what its history has open while it writes."""
    names = []
    for link in Path(f"/proc/{kernel.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            names.append(re.sub(r"\d+", "N", str(link.readlink())))
    return sorted(name for name in names if "history.sqlite" not in name)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("what", CELLS)
def test_twenty_of_twenty_stops_end_the_cell(kernel: Kernel, what: str) -> None:
    press(kernel, CELLS[what], 0.2)  # what the first launch opens stays
    before = descriptors(kernel)
    for i in range(SOAK_PRESSES):
        press(kernel, CELLS[what], 0.5 * i / SOAK_PRESSES)
    after = descriptors(kernel)
    assert len(after) <= len(before), Counter(after) - Counter(before)


def test_a_stop_before_the_fork_server_is_ready_costs_nothing() -> None:
    """Its word that it is ready must not be lost with the wait for it."""
    with a_kernel() as kernel:
        for delay in (0.0, 0.3, 1.0, 2.0):
            message = kernel.send(
                "import time\nfrom pardemo import launch\nprint('begun', flush=True)\n"
                "launch(time.sleep, 60, nprocs=2)"
            )
            kernel.wait_for_output("begun", timeout=60)
            time.sleep(delay)
            kernel.stop()
            assert kernel.reply(message).ename == "KeyboardInterrupt"
        assert kernel.run("print(len(launch(time.time, nprocs=2)))", timeout=90).out == "2\n"


def test_a_kernel_started_with_sigint_ignored_stops_all_the_same() -> None:
    """As a server started with `command &` from a script starts its kernels."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        opened = a_kernel()
        kernel = opened.__enter__()
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        assert kernel.run(SETUP + WORK).status == "ok"
        message = kernel.send(CELLS["a collective"])
        kernel.wait_for_output("now", timeout=90)
        kernel.stop()
        assert kernel.reply(message).ename == "KeyboardInterrupt"
        os.kill(kernel.pid, 0)
    finally:
        opened.__exit__(None, None, None)
