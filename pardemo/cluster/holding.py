"""Start, find and end the process that holds a node lab; and what to do where it cannot start."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pardemo.cluster import hub

HERE = Path(__file__).parent
START_S = 20.0
ALL = hub.NEWNS | hub.NEWUTS | hub.NEWIPC | hub.NEWPID | hub.NEWNET


class NodesError(RuntimeError):
    """The lab cannot be made or has ended; says what is missing and what to do."""


@dataclass
class Held:
    """A standing lab: its process 1 (`hub_pid`, which began at `began` clock ticks), one holder
    per node, and how it was asked for (`spec`). `process` is ours where we started it."""

    spec: dict[str, Any]
    hub_pid: int = 0
    began: int = 0
    holder_pids: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None

    def stand(self) -> None:
        """Let the lab outlive this process, which has left word of it (`save`)."""
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(b"s")
        self.process.stdin.close()

    @property
    def alive(self) -> bool:
        """Whether that very process still runs."""
        return bool(self.hub_pid) and _began(self.hub_pid) == self.began

    def end(self) -> None:
        """End the lab and everything in it; returns when it is gone."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.hub_pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
        for _ in range(500):
            if not self.alive:
                return
            time.sleep(0.01)


def start(spec: dict[str, Any]) -> Held:
    """Start the hub and wait until the nodes stand; NodesError says why they cannot."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(HERE / "hub.py"), json.dumps(spec)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if spec["stay"] else None,  # nobody waits for our end
        start_new_session=True,  # Ctrl-C in this terminal is for us, not for the lab
    )
    held = Held(spec, process=process)
    try:
        inner = _listen(held)
    except BaseException:
        held.end()
        raise
    held.began = _began(held.hub_pid)
    outer = _outer_pids(held.hub_pid)
    held.holder_pids = [outer[pid] for pid in inner]
    return held


def _listen(held: Held) -> list[int]:
    """Read the hub's events until it names its nodes' processes."""
    assert held.process is not None
    assert held.process.stdout is not None
    deadline, text = time.monotonic() + START_S, b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([held.process.stdout], [], [], left)[0]:
            raise NodesError(f"the node lab did not come up within {START_S:.0f} s")
        data = os.read(held.process.stdout.fileno(), 65536)
        *lines, text = (text + data).split(b"\n")
        for event in map(json.loads, lines):
            held.hub_pid = event.get("hub", held.hub_pid)
            if "error" in event:
                raise NodesError(explain(event["error"]))
            if "note" in event and event["note"] not in held.notes:
                held.notes.append(event["note"])
            if "nodes" in event:
                return list(event["nodes"])
        if not data:
            raise NodesError("the node lab's process ended while it was starting")


def entering(holder: int, folder: str, argv: Sequence[str]) -> list[str]:
    """The command line that runs `argv` in the namespaces of process `holder`."""
    flags = ALL | (hub.NEWUSER if os.geteuid() != 0 else 0)
    program = [sys.executable, "-I", "-S", str(HERE / "enter.py")]
    return [*program, str(holder), str(flags), folder, *argv]


def explain(error: str) -> str:
    """The kernel's words, and what to do about them."""
    text = f"this machine cannot make the node lab: {error.strip()}"
    if "unshare" in error:
        return text + (
            ". Run as root, or allow user namespaces (sysctl user.max_user_namespaces, "
            "kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns=0); "
            "in a container it needs --privileged"
        )
    if "mounting proc" in error:
        return text + ". A container that masks /proc forbids it: run it with --privileged"
    if "qdisc kind is unknown" in error:
        return text + (
            ". The kernel has no netem, which delays packets (sch_netem: modprobe sch_netem, or a "
            "kernel built with CONFIG_NET_SCH_NETEM). The rate can be set without it: leave "
            "latency_ms out"
        )
    return text


def state_file() -> Path:
    """Where `pardemo nodes up` leaves word of its lab: a folder only this user can write."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime or tempfile.gettempdir()) / f"pardemo-nodes-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    seen = folder.lstat()
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.geteuid() or seen.st_mode & 0o077:
        raise NodesError(f"{folder} is not a folder of this user alone: remove it")
    return folder / "lab.json"


def save(held: Held, new: bool = False) -> None:
    """Leave word of a standing lab; FileExistsError for a `new` one where another stands."""
    said = {key: value for key, value in vars(held).items() if key != "process"}
    file = state_file()
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(said))
    try:
        (os.link if new else os.replace)(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def load() -> Held | None:
    """The standing lab, or None where there is none any more."""
    file = state_file()
    try:
        held = Held(**json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        file.unlink(missing_ok=True)
        return None
    if not held.alive:
        forget()
        return None
    return held


def forget() -> None:
    """Remove the word of a standing lab, and its folder."""
    file = state_file()
    for left in file.parent.glob("lab.*"):  # also of one that was killed while it wrote
        left.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        file.parent.rmdir()


def _began(pid: int) -> int:
    """When a process began, in clock ticks since boot; -1 where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return -1
    fields = text.rsplit(")", 1)[1].split()
    return -1 if fields[0] == "Z" else int(fields[19])


def _outer_pids(hub_pid: int) -> dict[int, int]:
    """Process ids as the hub sees them -> as this process sees them, for the hub's children."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:
            continue  # ended meanwhile
        if re.search(rf"^PPid:\s+{hub_pid}$", text, re.MULTILINE):
            inner = re.search(r"^NSpid:.*?(\d+)$", text, re.MULTILINE)
            if inner:
                found[int(inner[1])] = int(status.parent.name)
    return found
