"""The process that keeps a node lab alive: namespaces belong to it, so its end is the lab's end.

Run by path with `python -I -S hub.py SPEC`, standard library only. It moves itself into new
namespaces (user where it is not root, network, mount, host name, IPC, process ids), becomes process
1 there, forks one holder per node with namespaces of its own, and joins them by a bridge and veth
pairs. Nothing has a name outside: when process 1 ends, however it ends, the kernel kills all that
runs inside and frees every interface. It ends when its standard input closes, unless SPEC["stay"]
and something was written there before: whoever made it has then left word of it.

SPEC is JSON: nodes [{name, address}], prefix, hosts, node_batch and port_batch (lines for `ip` and
`tc`), shm_bytes, user (make a user namespace), stay. One JSON line per event goes to stdout.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

NEWNS, NEWUTS, NEWIPC = 0x00020000, 0x04000000, 0x08000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_REC, MS_PRIVATE, MS_BIND = 0x4000, 0x40000, 0x1000
PR_SET_PDEATHSIG = 1
libc = ctypes.CDLL(None, use_errno=True)


def say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def checked(what: str, status: int) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int, what: str) -> None:
    checked(f"making {what} (unshare)", libc.unshare(ctypes.c_int(flags)))


def mount(source: str, target: str, kind: str | None, flags: int = 0, data: str = "") -> None:
    status = libc.mount(
        source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags),
        data.encode(),
    )  # fmt: skip
    checked(f"mounting {kind or source} on {target}", status)


def die_with_parent() -> None:
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def batch(lines: list[str]) -> None:
    """Feed lines that start with `ip` or `tc` to those tools; OSError says which line failed."""
    for tool in ("ip", "tc"):
        wanted = [line.split(" ", 1)[1] for line in lines if line.startswith(f"{tool} ")]
        if not wanted:
            continue
        try:
            done = subprocess.run(
                [tool, "-batch", "-"], input="\n".join(wanted), text=True, capture_output=True
            )
        except FileNotFoundError:
            raise OSError(f"the command {tool!r} is missing: install iproute2") from None
        if done.returncode:
            raise OSError(f"{tool} refused: {done.stderr.strip()}")


def own_user_namespace() -> None:
    """Become root of a user namespace in which only this user exists."""
    user, group = os.geteuid(), os.getegid()
    unshare(NEWUSER, "a user namespace")
    for name, text in (
        ("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")
    ):  # fmt: skip
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def hold_node(node: dict[str, str], spec: dict[str, Any], go: int, ready: int) -> None:
    """One node, in a process of its own: namespaces, host name, hosts file, memory, interface."""
    unshare(NEWNET | NEWNS | NEWUTS | NEWIPC, "a node's namespaces")
    libc.sethostname(node["name"].encode(), len(node["name"]))
    hosts = f"/dev/shm/hosts-{node['name']}"
    with open(hosts, "w") as file:
        file.write(spec["hosts"])
    mount(hosts, "/etc/hosts", None, MS_BIND)
    os.unlink(hosts)
    mount("tmpfs", "/dev/shm", "tmpfs", data=f"size={spec['shm_bytes']},mode=1777")
    os.write(ready, b"n")
    os.read(go, 1)
    try:
        mount("sysfs", "/sys", "sysfs")
    except OSError:
        say(note="/sys keeps showing the machine's own interfaces: sysfs cannot be mounted here")
    batch(
        [
            "ip link set dev lo up", "ip link set dev eth0 addrgenmode none",
            f"ip addr add {node['address']}/{spec['prefix']} dev eth0", "ip link set dev eth0 up",
            *spec["node_batch"],
        ]
    )  # fmt: skip
    os.write(ready, b"u")


def start_node(node: dict[str, str], spec: dict[str, Any]) -> tuple[int, int, int]:
    """Fork a node's holder; returns (pid, pipe that lets it go on, pipe on which it answers)."""
    go_read, go_write = os.pipe()
    ready_read, ready_write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(go_read)
        os.close(ready_write)
        return pid, go_write, ready_read
    guarded(lambda: hold_node(node, spec, go_read, ready_write))
    os.close(ready_write)
    while True:
        signal.pause()


def guarded(work: Callable[[], None]) -> None:
    """Do it, or say the error as an event and exit."""
    try:
        work()
    except OSError as error:
        say(error=error.strerror if error.errno and error.strerror else str(error))
        os._exit(1)


def set_up(spec: dict[str, Any]) -> list[int]:
    """Mounts, bridge and nodes; returns the holders' pids, in this process-id namespace."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("proc", "/proc", "proc")
    mount("tmpfs", "/dev/shm", "tmpfs", data="size=1m")
    libc.sethostname(b"hub", 3)
    started = [start_node(node, spec) for node in spec["nodes"]]
    lines = ["ip link set dev lo up", "ip link add name lab type bridge"]
    lines += ["ip link set dev lab addrgenmode none", "ip link set dev lab up"]
    for index, (pid, _, ready) in enumerate(started):
        if os.read(ready, 1) != b"n":
            os._exit(1)  # the holder has said why
        lines += [
            f"ip link add name port{index} type veth peer name eth0 netns {pid}",
            f"ip link set dev port{index} addrgenmode none",
            f"ip link set dev port{index} master lab up",
            *(line.format(port=f"port{index}") for line in spec["port_batch"]),
        ]
    batch(lines)
    for _, go, _ in started:
        os.write(go, b"g")
    for _, _, ready in started:
        if os.read(ready, 1) != b"u":
            os._exit(1)
    return [pid for pid, _, _ in started]


def first_process(spec: dict[str, Any]) -> None:
    """Process 1 of the lab: set it up, then wait for the end."""
    die_with_parent()
    guarded(lambda: say(nodes=set_up(spec)))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans of the lab are reaped here
    if not (os.read(0, 1) and spec["stay"]):
        os._exit(0)
    for end in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(end, lambda *_: os._exit(0))
    os.close(1)  # whoever ran `nodes up` may be waiting for the end of our output
    while True:
        signal.pause()


def main() -> None:
    spec = json.loads(sys.argv[1])
    if spec["user"]:
        guarded(own_user_namespace)
    guarded(lambda: unshare(NEWNET | NEWNS | NEWUTS | NEWIPC | NEWPID, "namespaces"))
    pid = os.fork()
    if pid == 0:
        first_process(spec)
    say(hub=pid)
    if spec["stay"]:
        os.close(1)
    for end in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(end, lambda *_: os.kill(pid, signal.SIGKILL))
    os.close(0)
    while True:
        try:
            _, status = os.waitpid(pid, 0)
        except InterruptedError:
            continue
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


if __name__ == "__main__":
    main()
