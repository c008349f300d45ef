"""One rank's life: set up the process and its group, then run what the kernel sends.

Two threads. The main one runs the learner's functions. The other reads the kernel's socket, so that
a rank blocked in a collective can still say where it is, and ends the process group of a rank whose
kernel is gone. Everything ends with `os._exit`: an interpreter shutdown after `import torch` costs
more than a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing.process
import os
import queue
import random
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pardemo.launch import family, inside, leftovers, pickling, progress, wire


def main(
    rank: int, control_fd: int, out_fd: int, err_fd: int, stacks_fd: int, *, folder: str = ""
) -> None:
    """Run as rank `rank` on the given descriptors; never returns.

    `folder`, made here, takes what multiprocessing keeps on disk, also in this rank's children.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the kernel stops ranks itself
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # until here it is, under spawn
    family.adopt_orphans()
    _redirect(out_fd, err_fd)
    faulthandler.enable(file=stacks_fd, all_threads=True)  # a signal may reach any thread
    faulthandler.register(signal.SIGUSR1, file=stacks_fd, all_threads=True)
    if folder := leftovers.make_folder(folder):
        config: dict[str, Any] = multiprocessing.process.current_process()._config  # type: ignore[attr-defined]
        config["tempdir"] = folder
        leftovers.note(folder)
    Rank(rank, socket.socket(fileno=control_fd), folder).serve()
    leftovers.clear(folder)  # the kernel does too, unless it is killed now
    os._exit(0)


def _redirect(out_fd: int, err_fd: int) -> None:
    """Standard output and error into the given pipes, standard input at its end."""
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (out_fd, 1), (err_fd, 2)):
        os.dup2(source, target)
        os.close(source)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", 1, "utf-8", "backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, "utf-8", "backslashreplace", closefd=False)  # noqa: SIM115


class Rank:
    """What one rank keeps between calls."""

    def __init__(self, rank: int, sock: socket.socket, folder: str) -> None:
        self.rank, self.folder = rank, folder
        self.channel = wire.Channel(sock)
        self.reader = wire.Reader(sock)
        self.inbox: queue.SimpleQueue[wire.Message] = queue.SimpleQueue()
        self.main_thread = threading.get_ident()
        self.reporter = progress.Reporter(self.channel)
        progress.listen(self.reporter)
        os.register_at_fork(after_in_child=sock.close)  # a DataLoader worker must not hold it

    def serve(self) -> None:
        """Set up as the first message says, then run calls until the last one."""
        threading.Thread(target=self._listen, daemon=True, name="pardemo-listen").start()
        setup = self.inbox.get()
        try:
            _set_up(self.rank, setup.meta)
        except BaseException as error:
            self._failed(error, call=0)
            threading.Event().wait()  # stay: a closed connection would make others fail as well
        self.channel.send("ready", call=0, at=time.monotonic())
        while True:
            message = self.inbox.get()
            if self._run(message) and message.meta["last"]:
                break
        with contextlib.suppress(Exception):  # the value is sent; peers may be gone already
            if dist.is_initialized():
                dist.destroy_process_group()

    def _listen(self) -> None:
        for message in self.reader.wait():
            if message.kind == "where":
                self.channel.send("where", **inside.where(self.main_thread))
            else:
                self.inbox.put(message)
        if self.folder:
            leftovers.clear(self.folder)
        family.kill(os.getpid())  # the kernel is gone, or has dropped this group

    def _run(self, message: wire.Message) -> bool:
        """Run one call and send its value or its error; whether it returned."""
        call = message.meta["call"]
        pickling.add_sources(message.meta["sources"])
        try:
            fn, args, kwargs = pickling.unpack(message.body)
            value = fn(*args, **kwargs)
            returned = time.monotonic()
            what = f"the value rank {self.rank} returned (a {type(value).__name__})"
            parts, _ = pickling.pack(value, what, detach=True)
        except BaseException as error:  # SystemExit and KeyboardInterrupt are failures too
            self._failed(error, call)
            return False
        self._flush()
        meta: dict[str, Any] = {"call": call, "at": returned}
        if message.meta["last"]:  # nobody can ask this rank later
            meta["collectives"] = inside.collectives()
        self.channel.send("returned", parts, **meta)
        return True

    def _failed(self, error: BaseException, call: int) -> None:
        """Report an error. The process stays alive: its death would look like a second failure."""
        at = time.monotonic()
        meta: dict[str, Any] = {
            "call": call,
            "at": at,
            "error": type(error).__name__,
            "message": inside.safe_text(error),
            "chain": [_link(e) for e in inside.chain(error)],
            "traceback": inside.format_error(error),
            "collectives": inside.collectives(),
        }
        self._flush()
        self.channel.send("raised", **meta)

    def _flush(self) -> None:
        """Everything written so far is in the pipes, C's buffers included."""
        self.reporter.flush()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # the learner may have put anything in their place
                stream.flush()
        ctypes.CDLL(None).fflush(None)


def _link(error: BaseException) -> dict[str, Any]:
    """What the kernel needs to tell a cause from a consequence."""
    return {
        "runtime": isinstance(error, RuntimeError),
        "in_torch": inside.raised_in_torch(error),
        "message": inside.safe_text(error),
    }


def _set_up(rank: int, setup: dict[str, Any]) -> None:
    """Environment, directory, import path, seeds, threads, device and process group of a rank."""
    os.environ.clear()
    os.environ.update(setup["environ"])
    with contextlib.suppress(OSError):  # the kernel's directory may be gone
        os.chdir(setup["cwd"])
    sys.path[:] = setup["path"]
    sys.argv[:] = setup["argv"]
    inside.main_module()
    dist.set_debug_level_from_env()
    torch.set_num_threads(setup["threads"])
    seed_all(setup["seed"], rank)
    backend = setup["backend"]
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    if backend != "none":
        dist.init_process_group(backend, timeout=timedelta(seconds=setup["group_timeout"]))


def seed_all(seed: int | None, rank: int) -> None:
    """Seed Python, NumPy and torch with `seed + rank`; from the system where `seed` is None."""
    chosen = int.from_bytes(os.urandom(4)) if seed is None else seed + rank
    random.seed(chosen)
    torch.manual_seed(chosen)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(chosen % 2**32)
