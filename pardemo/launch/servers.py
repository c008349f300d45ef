"""How rank processes come to be: forked by a fork server, or by torch's spawn (`spawned`).

Both give a `Started`: per rank the kernel's ends of a socket and three pipes, and a way to learn
which process died of what. Everything above is the same for both.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pardemo.launch import family, leftovers, watch

_FDS_PER_RANK = 4  # a socket and three pipes
_ZYGOTE = "pardemo.launch.zygote"
# nothing is imported from the learner's folder: a random.py there would stand in for Python's; and
# it must not outlive its kernel while it imports torch, when it does not look at its socket yet
_BOOT = (
    "import sys; sys.path[:] = filter(None, sys.path); "
    f"{family.bound_to('int(sys.argv[-1])')}"
    f"from {_ZYGOTE} import main; main()"
)
Reading = Callable[[], list[tuple[int, str, Any]]]


@dataclass
class RankEnd:
    """The kernel's ends of one rank's connections."""

    rank: int
    control: socket.socket
    out: int
    err: int
    stacks: int

    def close(self) -> None:
        """Close all of them."""
        self.control.close()
        for fd in (self.out, self.err, self.stacks):
            os.close(fd)


@dataclass
class Started:
    """A group of rank processes. `watch` maps a descriptor to what to call when it is readable;
    the call returns events `(rank, what, value)` with `what` in pid, exited, error, closed."""

    ends: list[RankEnd]
    watch: dict[int, Reading]
    stop: Callable[[], None]  # kill them all
    release: Callable[[], None]  # once they are dead
    pids: dict[int, int] = field(default_factory=dict)


def open_ends(nprocs: int) -> tuple[list[RankEnd], list[list[int]]]:
    """The kernel's ends, and the descriptors each rank gets."""
    made: list[int] = []
    try:
        for _ in range(nprocs):
            here, there = socket.socketpair()
            made += [here.detach(), there.detach()]
            for _ in range(3):
                made += os.pipe()
    except OSError as error:
        for fd in made:
            os.close(fd)
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise OSError(
            error.errno,
            f"{nprocs} ranks need {_FDS_PER_RANK * nprocs} open descriptors here, and as many "
            f"again while they start; this process may have {limit} in all (ulimit -n): "
            f"{error.strerror}",
        ) from None
    ends, theirs = [], []
    for rank in range(nprocs):
        here_fd, there_fd, *pipes = made[8 * rank : 8 * rank + 8]
        for reading in pipes[::2]:
            os.set_blocking(reading, False)
        ends.append(RankEnd(rank, socket.socket(fileno=here_fd), *pipes[::2]))
        theirs.append([there_fd, *pipes[1::2]])
    return ends, theirs


class ForkServer:
    """This kernel's fork server process; started by the first use, ended by the kernel's end."""

    def __init__(self) -> None:
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environ = dict(os.environ, OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
        package = str(Path(__file__).parents[2])
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, [package, environ.get("PYTHONPATH")]))
        command = [
            sys.executable,
            "-c",
            _BOOT,
            _ZYGOTE,  # what a list of processes shows
            str(theirs.fileno()),
            str(os.getpid()),
        ]
        self.process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self.ready = False
        self._lock = threading.Lock()
        watch.close_in_children(self.sock)

    def alive(self) -> bool:
        """Whether it can still fork ranks."""
        return self.process.poll() is None

    def wait_ready(self) -> None:
        """Wait for its import of torch, the first time; may be interrupted and called again."""
        with self._lock:
            if not self.ready:
                with watch.interrupts_allowed():
                    select.select([self.sock], [], [])  # its word is taken when it is there
            if not self.ready and self.sock.recv(16) != b"ready":
                raise RuntimeError(
                    f"the fork server could not start (exit status {self.process.wait()}); "
                    "its message is above; start='spawn' does without it"
                )
            self.ready = True

    def start(self, nprocs: int) -> Started:
        """Fork `nprocs` ranks."""
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ends, theirs = open_ends(nprocs)
        folders = leftovers.name_folders(nprocs)
        socket.send_fds(self.sock, [b"group"], [there.fileno()])
        there.close()
        for rank, (fds, folder) in enumerate(zip(theirs, folders, strict=True)):
            request = json.dumps({"fork": rank, "folder": folder})
            socket.send_fds(here, [request.encode()], fds)
            for fd in fds:
                os.close(fd)
        watch.close_in_children(here)
        watched: dict[int, Reading] = {here.fileno(): functools.partial(_read_group, here)}

        def release() -> None:
            here.close()
            leftovers.clear(*folders)

        return Started(ends, watched, functools.partial(_end, here), release)


def _read_group(sock: socket.socket) -> list[tuple[int, str, Any]]:
    try:
        data = sock.recv(4096, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return []
    except OSError:
        data = b""
    if not data:
        return [(-1, "closed", None)]
    message = json.loads(data)
    rank = message.pop("rank", -1)
    return [(rank, key, value) for key, value in message.items()]


def _end(sock: socket.socket) -> None:
    """Tell the fork server that nobody wants this group any more: it kills it."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)


_starting = threading.Lock()  # two threads that launch at once share one fork server


@functools.cache
def _server_of(pid: int) -> list[ForkServer]:
    return []


def fork_server() -> ForkServer:
    """This process's fork server, started where there is none (or it died, or we are a fork)."""
    with _starting:
        kept = _server_of(os.getpid())
        if not kept or not kept[0].alive():
            kept[:] = [ForkServer()]
        return kept[0]


def warm_up() -> None:
    """In a Jupyter kernel, start the fork server now: its import of torch hides behind the cells
    that come before the first launch."""
    if sys.platform == "linux" and in_kernel():
        fork_server()


def in_kernel() -> bool:
    """Whether this process is a Jupyter kernel."""
    if "ipykernel" not in sys.modules:
        return False
    from IPython import get_ipython

    return hasattr(get_ipython(), "kernel")
