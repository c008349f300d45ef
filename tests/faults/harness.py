"""What every planted fault runs under: nothing outlives it, nothing is left, the next run works.

`nothing_left(tmp_path)` makes this process the reaper of every orphan below it, gives the fault a
temporary folder of its own, and compares processes, listeners, descriptors, shared memory and
temporary files before and after. `Program` is a script of its own, which a test sends signals to.
Give each test `@pytest.mark.timeout(...)`: the hard deadline of whatever happens inside.
"""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from pardemo.launch import launch

ROOT = Path(__file__).resolve().parents[2]
SETTLE_S = 5.0
OFFLINE = "[c10d] The hostname of the client socket cannot be retrieved"  # torch, without a network
_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.05
_TORCHS = f"torchinductor_{getpass.getuser()}"  # torch's cache of compiled code, made on import


def healthy() -> None:
    """A normal run of two ranks works here and now."""

    def total() -> float:
        value = torch.ones(3) * (dist.get_rank() + 1)
        dist.all_reduce(value)  # moves 12 bytes
        return value.sum().item()

    assert list(launch(total, nprocs=2, echo=False)) == [9.0, 9.0]


def clear(folder: Path) -> None:
    """Empty a folder."""
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


@dataclass(frozen=True)
class State:
    """What this process and all below it hold. Equal before and after, or something was left."""

    processes: Counter[str]  # command lines, numbers taken out
    listeners: Counter[str]  # addresses of listening sockets
    descriptors: Counter[str]  # of each process that was there from the beginning
    shared_memory: frozenset[str]  # in /dev/shm; what strangers hold does not count as left
    temporary: frozenset[str]  # in the fault's own temporary folder

    def beyond(self, before: State) -> dict[str, Any]:
        """What is here and was not before, by field; empty is good."""
        return {
            field.name: more
            for field in fields(self)
            if (more := getattr(self, field.name) - getattr(before, field.name))
        }


def family() -> list[psutil.Process]:
    """This process and everything below it, adopted orphans included; zombies too."""
    here = psutil.Process()
    return [here, *here.children(recursive=True)]


def left_in(folder: Path, *usual: str) -> list[str]:
    """What lies in a temporary folder beside `usual` and torch's cache of compiled code."""
    return [
        entry.name
        for entry in folder.iterdir()
        if entry.name not in usual and not entry.name.startswith("torchinductor_")
    ]


def alive(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; a dead one that nobody has waited for counts as dead."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def gone_within(processes: Sequence[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait until all have ended; those that have not after `seconds`."""
    deadline = time.monotonic() + seconds
    while alive(processes) and time.monotonic() < deadline:
        time.sleep(_POLL_S / 5)
    return alive(processes)


def listeners(processes: Sequence[psutil.Process]) -> Counter[str]:
    """The addresses on which these processes listen, IPv4 and IPv6."""
    found: Counter[str] = Counter()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found[connection.laddr.ip] += 1
    return found


def state(folder: Path, old: Sequence[int]) -> State:
    """What there is now; descriptors are counted for the processes `old` only."""
    members = family()
    commands, descriptors = Counter[str](), Counter[str]()
    for process in members:
        with contextlib.suppress(psutil.Error):
            command = re.sub(r"\d+", "N", " ".join(process.cmdline()) or process.name())
            commands[command] += 1
            if process.pid in old:
                descriptors[f"{process.pid} {command}"] = process.num_fds()
    return State(
        commands,
        listeners(members),
        descriptors,
        frozenset(os.listdir("/dev/shm")),
        frozenset(str(p.relative_to(folder)) for p in folder.rglob("*") if p.name != _TORCHS),
    )


def _reap_orphans(old: Sequence[int]) -> None:
    """Wait for adopted children: nobody else will. They live in another session than ours."""
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE or process.pid in old:
                continue
            if os.getsid(process.pid) != os.getsid(0) and process.pid not in Program.started:
                os.waitpid(process.pid, os.WNOHANG)


def strangers_hold(name: str) -> bool:
    """Whether a process that is not ours has this segment of /dev/shm mapped or open."""
    ours = {process.pid for process in family()}
    for process in psutil.process_iter():
        if process.pid in ours:
            continue
        with contextlib.suppress(OSError):
            if f"/dev/shm/{name}" in Path(f"/proc/{process.pid}/maps").read_text():
                return True
            for fd in Path(f"/proc/{process.pid}/fd").iterdir():
                if os.readlink(fd).startswith(f"/dev/shm/{name}"):
                    return True
    return False


@contextlib.contextmanager
def nothing_left(tmp_path: Path, within_s: float = SETTLE_S) -> Iterator[Path]:
    """The fault goes inside. Fails unless all is as before within `within_s` after it, and a
    normal run works then. Gives the temporary folder that this process, its ranks and every
    `Program` use inside."""
    healthy()  # this process's fork server runs: it belongs to the state before
    resource_tracker.ensure_running()  # Python's own helper, which `spawn` starts once
    folder = tmp_path / "t"  # short: a path of a socket has 107 characters
    folder.mkdir(exist_ok=True)
    old = [process.pid for process in family()]
    kept, environ = tempfile.tempdir, os.environ.get("TMPDIR")
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    before = state(folder, old)
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    try:
        yield folder
        left = _settle(before, folder, old, within_s)
        healthy()
        assert left == {}, f"left behind: {left}"
    except BaseException:
        _kill_new(old)  # what the fault has started must not disturb the tests that follow
        raise
    finally:
        tempfile.tempdir = kept
        os.environ.pop("TMPDIR")
        if environ is not None:
            os.environ["TMPDIR"] = environ
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)


def _settle(before: State, folder: Path, old: Sequence[int], within_s: float) -> dict[str, Any]:
    """Wait for the dust to settle; what is left then. Leftover processes are killed, but named."""
    deadline = time.monotonic() + within_s
    while True:
        _reap_orphans(old)
        left = state(folder, old).beyond(before)
        shared = {name for name in left.pop("shared_memory", ()) if not strangers_hold(name)}
        if shared:
            left["shared_memory"] = shared
        if not left or time.monotonic() > deadline:
            break
        time.sleep(_POLL_S)
    if "processes" in left:
        _kill_new(old)
    return left


def _kill_new(old: Sequence[int]) -> None:
    for process in family()[1:]:
        if process.pid not in old:
            with contextlib.suppress(psutil.Error):
                process.kill()


class Program:
    """A Python script, or a command, as a user starts it: in its own session, its output in files.

    Without `source`, `command` and the arguments are all there is. `sigint_ignored` starts it as a
    shell starts `command &`. `before` runs in the new process, to set its limits.
    `environ` goes on top of this process's.
    """

    started: set[int] = set()  # noqa: RUF012  all programs of this process

    def __init__(
        self,
        folder: Path,
        source: str | None,
        *arguments: str,
        command: Sequence[str] = (sys.executable,),
        sigint_ignored: bool = False,
        before: Callable[[], None] | None = None,
        **environ: str,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="program-", dir=folder))
        words = [*command, *arguments]
        if source is not None:
            script = self.folder / "script.py"
            script.write_text(textwrap.dedent(source))
            words = [*command, str(script), *arguments]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

        def prepare() -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN if sigint_ignored else signal.SIG_DFL)
            if before is not None:
                before()

        with (self.folder / "out").open("w") as out, (self.folder / "err").open("w") as err:
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environ},
                start_new_session=True,
                preexec_fn=prepare,
            )
        self.started.add(self.process.pid)
        self.pid = self.process.pid

    @property
    def out(self) -> str:
        """Standard output so far."""
        return (self.folder / "out").read_text(errors="replace")

    @property
    def err(self) -> str:
        """Standard error so far."""
        return (self.folder / "err").read_text(errors="replace")

    @property
    def said(self) -> list[str]:
        """The lines of standard error so far, without torch's own where there is no network."""
        return [line for line in self.err.splitlines() if OFFLINE not in line]

    def wait_for(self, text: str, seconds: float = 120.0, times: int = 1) -> None:
        """Wait until it has printed `text` that many times."""
        deadline = time.monotonic() + seconds
        while self.out.count(text) < times:
            ended = self.process.poll()
            if ended is not None or time.monotonic() > deadline:
                how = f"ended with status {ended}" if ended is not None else "is too slow"
                raise AssertionError(f"no {text!r}: it {how}\n{self.out}\n{self.err}")
            time.sleep(_POLL_S / 5)

    def family(self) -> list[psutil.Process]:
        """It and everything below it, in other sessions too."""
        top = psutil.Process(self.pid)
        return [top, *top.children(recursive=True)]

    def wait_below(self, words: str, seconds: float = 120.0) -> list[psutil.Process]:
        """Wait until something below it has these words in its command line; all that have."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = []
            for process in self.family():
                with contextlib.suppress(psutil.Error):  # it has just ended
                    if words in " ".join(process.cmdline()):
                        found.append(process)
            if found:
                return found
            time.sleep(_POLL_S / 5)
        raise AssertionError(f"nothing below it is {words!r}\n{self.out}\n{self.err}")

    def send(self, signum: int, group: bool = False) -> None:
        """Send a signal to it alone, or to its process group as a terminal's Ctrl-C does."""
        (os.killpg if group else os.kill)(self.pid, signum)

    def end(self, seconds: float = 30.0) -> int:
        """Its exit status; a negative one is the signal that killed it. Killed if it is late."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"it did not end in {seconds} s\n{self.out}\n{self.err}") from None
