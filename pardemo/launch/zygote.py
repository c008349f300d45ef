"""The fork server: one single-threaded process per kernel that has imported torch and forks ranks.

Forking the kernel itself would copy its locks, its OpenMP pool and its CUDA context without the
threads behind them: a rank that then multiplies two matrices hangs. This process never runs an
operator, never starts a thread and never touches CUDA, so its fork is safe and takes milliseconds.

It lives in its own session. The kernel holds one socket to it and one per group of ranks; when a
group's socket ends, for whatever reason, that group is killed with all its children, and when the
kernel's socket ends, everything is. A kernel that was killed with SIGKILL has closed them too.
Ranks adopt the orphans below them, and this process those of a rank that has ended: a child of it
that is no rank is left over, and is killed.
"""

from __future__ import annotations

import array
import contextlib
import errno
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.multiprocessing as mp

from pardemo.launch import family, leftovers
from pardemo.launch import rank as rank_module

# A rank that uses these finds them loaded; together with torch they cost seconds to import.
_PRELOADED = [
    "torch.nn.parallel",
    "torch.distributed.device_mesh",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
]
_POLL_S = 1.0  # between two looks at who our parent is
_SWEEP_S = 2.0  # for what ended ranks have left, and what that leaves, to end
_FDS_PER_RANK = 4


@dataclass
class Group:
    """The ranks forked for one group, and the socket whose end means: kill them."""

    sock: socket.socket
    folders: dict[int, str] = field(default_factory=dict)  # by rank, what it keeps on disk
    processes: dict[int, Any] = field(default_factory=dict)


class ForkServer:
    """Serves one kernel until its socket closes; then kills every rank and leaves."""

    def __init__(self, sock: socket.socket, kernel_pid: int) -> None:
        self.sock = sock
        self.kernel_pid = kernel_pid
        self.groups: dict[int, Group] = {}
        self.wake_r, self.wake_w = socket.socketpair()
        self.wake_r.setblocking(False)
        self.wake_w.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda signum, frame: None)
        signal.set_wakeup_fd(self.wake_w.fileno(), warn_on_full_buffer=False)

    def serve(self) -> None:
        """Fork ranks on request, report their deaths; return when the kernel is gone."""
        family.adopt_orphans()
        family.end_with_parent(False)  # it ends with the thread that started it while it imports
        self.sock.send(b"ready")
        while True:
            fds = [self.sock, self.wake_r, *(group.sock for group in self.groups.values())]
            readable, _, _ = select.select(fds, [], [], _POLL_S)
            if os.getppid() != self.kernel_pid:
                return
            with contextlib.suppress(BlockingIOError):
                self.wake_r.recv(4096)
            self._reap()
            for group in list(self.groups.values()):
                if group.sock in readable:
                    self._serve_group(group)
            if self.sock in readable and not self._accept():
                return

    def _accept(self) -> bool:
        """Take the socket of a new group from the kernel; False when the kernel is gone."""
        data, fds = _receive(self.sock)
        for fd in fds:
            group = Group(socket.socket(fileno=fd))
            self.groups[fd] = group
        return bool(data)

    def _serve_group(self, group: Group) -> None:
        try:
            data, fds = _receive(group.sock)
        except ConnectionResetError:
            data, fds = b"", []
        if not data:
            self.end(group)
            return
        request = json.loads(data)
        group.folders[request["fork"]] = request["folder"]
        self._fork(group, request["fork"], fds)

    def _fork(self, group: Group, rank: int, fds: list[int]) -> None:
        try:
            if len(fds) != _FDS_PER_RANK:
                raise OSError("too many open files (ulimit -n)")
            threads = len(os.listdir("/proc/self/task"))
            if threads != 1 or torch.cuda.is_initialized():
                raise OSError(f"it has {threads} threads: not safe; start='spawn' does without it")
            self._start(group, rank, fds)
        except OSError as error:
            hint = " (too many processes: ulimit -u)" if error.errno == errno.EAGAIN else ""
            _reply(group, error=f"the fork server cannot fork rank {rank}: {error}{hint}")
        finally:
            for fd in fds:
                os.close(fd)

    def _start(self, group: Group, rank: int, fds: list[int]) -> None:
        process: Any = mp.get_context("fork").Process(
            target=self._child, args=(os.getpid(), rank, fds, group.folders[rank])
        )
        process.start()
        with contextlib.suppress(OSError):  # the rank does it too: whoever is first
            os.setpgid(process.pid, process.pid)
        group.processes[rank] = process
        _reply(group, rank=rank, pid=process.pid)

    def _child(self, parent: int, rank: int, fds: list[int], folder: str) -> None:
        """In the new process: become a rank, tied to the fork server's life."""
        family.end_with_parent(True)
        if os.getppid() != parent:
            os._exit(1)
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        inherited = [self.sock, self.wake_r, self.wake_w, *(g.sock for g in self.groups.values())]
        for sock in inherited:
            sock.close()
        rank_module.main(rank, *fds, folder=folder)

    def _reap(self) -> None:
        for group in self.groups.values():
            self._bury(group, [r for r, p in group.processes.items() if p.exitcode is not None])

    def _bury(self, group: Group, ranks: list[int]) -> None:
        """Forget ranks that have ended, end all that they have left to us, then report them."""
        codes = {}
        for rank in ranks:
            process = group.processes.pop(rank)
            codes[rank] = process.exitcode
            family.kill(process.pid)  # its process group: DataLoader workers
            process.close()
        living = {p.pid for group in self.groups.values() for p in group.processes.values()}
        family.end_children(living, _SWEEP_S)
        for rank, code in codes.items():
            _reply(group, rank=rank, exited=code)

    def end(self, group: Group) -> None:
        """Kill what is left of a group, wait for it, and say so by closing its socket."""
        for process in group.processes.values():
            family.kill(process.pid)
        for process in group.processes.values():
            process.join()
        self._bury(group, list(group.processes))
        leftovers.clear(*group.folders.values())
        del self.groups[group.sock.fileno()]
        group.sock.close()


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    data, ancillary, _, _ = sock.recvmsg(
        4096, socket.CMSG_SPACE(4 * _FDS_PER_RANK), socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return data, list(fds)


def _reply(group: Group, **message: Any) -> None:
    with contextlib.suppress(OSError):  # the kernel may be gone; its end of file will say so
        group.sock.send(json.dumps(message).encode())


def _preload() -> None:
    """Import what ranks may use. What cannot be imported is said, and left to who needs it."""
    for name in _PRELOADED:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"note: {name} is not loaded in advance for ranks: {said}", file=sys.stderr)


def main() -> None:
    """Serve the kernel at the other end of a socket; `sys.argv` ends with it and the kernel."""
    fd, kernel_pid = map(int, sys.argv[-2:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _preload()
    server = ForkServer(socket.socket(fileno=fd), kernel_pid)
    gc.freeze()
    try:
        server.serve()
    finally:
        for process in [p for g in server.groups.values() for p in g.processes.values()]:
            family.kill(process.pid)  # all at once, before anything is waited for
        for group in list(server.groups.values()):
            server.end(group)
        os._exit(0)
