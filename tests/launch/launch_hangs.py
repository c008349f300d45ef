"""Functions in which one rank stays away and the others wait for it; it is given to them."""

from __future__ import annotations

import ctypes
import os
import signal
import time

import torch
import torch.distributed as dist


def rank() -> int:
    return dist.get_rank()


def wait_for_all() -> None:
    dist.all_reduce(torch.ones(4))  # moves 16 bytes between the ranks


def sleeps(culprit: int) -> None:
    if rank() == culprit:
        time.sleep(60)
    wait_for_all()


def keeps_the_interpreter(culprit: int) -> None:
    """Blocks in C with the interpreter's lock held: no Python thread of that rank can run."""
    if rank() == culprit:
        ctypes.PyDLL(None).sleep(60)
    wait_for_all()


def stops_its_process(culprit: int) -> None:
    if rank() == culprit:
        os.kill(os.getpid(), signal.SIGSTOP)
    wait_for_all()


def waits_elsewhere(culprit: int) -> None:
    """Waits for a message nobody sends, while the others are one collective on."""
    wait_for_all()
    if rank() == culprit:
        dist.recv(torch.ones(1), src=(culprit + 1) % dist.get_world_size())
    wait_for_all()


def swallows_everything(culprit: int) -> None:
    while True:
        try:
            if rank() == culprit:
                time.sleep(60)
            wait_for_all()
        except BaseException:
            continue
