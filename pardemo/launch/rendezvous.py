"""Where the ranks of one group meet: a store in the kernel, on loopback, on a port nobody chose.

A TCPStore listens on every address even when told 127.0.0.1, and asking for a free port first
leaves a moment in which somebody else takes it. Handing it a socket that already listens on
loopback (`master_listen_fd`) settles both. `TORCHELASTIC_USE_AGENT_STORE` makes every rank a
client, so that the learner's `init_process_group` is the one of a torchrun script. A store serves
one group: a second one would find the first one's addresses.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import sys
from datetime import timedelta

import torch.distributed as dist

LOOPBACK = "127.0.0.1"
_LISTEN_BACKLOG = 512
_SIOCGIFFLAGS, _IFF_UP = 0x8913, 1  # Linux: ask for an interface's flags; the flag of being up


def check_loopback() -> None:
    """RuntimeError where the loopback interface is down: ranks would wait there for ever."""
    if sys.platform != "linux":
        return
    request = struct.pack("16sH14x", b"lo", 0)
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        (flags,) = struct.unpack_from("H", fcntl.ioctl(asking, _SIOCGIFFLAGS, request), 16)
        if not flags & _IFF_UP:
            raise RuntimeError(
                "the loopback interface is down, and ranks on one machine talk over it: "
                "bring it up with `ip link set lo up` (in this network namespace, as root)"
            )


def open_store(timeout_s: float) -> dist.TCPStore:
    """A store that serves one group of ranks, listening on loopback only."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen(_LISTEN_BACKLOG)
        port = listener.getsockname()[1]
        return dist.TCPStore(
            LOOPBACK,
            port,
            world_size=None,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )


def environment(rank: int, nprocs: int, threads: int, port: int, debug: bool) -> dict[str, str]:
    """The variables that torchrun would have set for this rank, plus loopback-only transports."""
    found = {
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nprocs),
        "LOCAL_WORLD_SIZE": str(nprocs),
        "GROUP_RANK": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": str(threads),
    }
    if debug:
        found["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
    return found
