"""A real Jupyter kernel for tests: run cells, press stop, kill it, count what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import Empty
from typing import Any

import psutil
from jupyter_client.manager import KernelManager

from tests.faults.harness import alive as alive


@dataclass
class Reply:
    """What a cell said: its status, its error, its streams in order, its displays' last state."""

    status: str = ""
    ename: str = ""
    evalue: str = ""
    out: str = ""
    err: str = ""
    shown: dict[str, str] = field(default_factory=dict)


class Kernel:
    """An ipykernel in its own process, as Jupyter starts it."""

    def __init__(self, **environ: str) -> None:
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(env={**os.environ, **environ}, stderr=None)
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)
        self.pid = self.manager.provisioner.process.pid

    def send(self, code: str) -> str:
        """Start a cell; its message id, which is kept as `last` too."""
        self.last = self.client.execute(code)
        return self.last

    def run(self, code: str, timeout: float = 60) -> Reply:
        """Run a cell to its end."""
        return self.reply(self.send(code), timeout)

    def reply(self, message_id: str, timeout: float = 60) -> Reply:
        """The end of a cell that was started."""
        reply, deadline = Reply(), time.monotonic() + timeout
        while True:
            message = self._next(deadline)
            if message["parent_header"].get("msg_id") != message_id:
                continue
            if self._take(message, reply):
                break
        shell = self.client.get_shell_msg(timeout=max(1.0, deadline - time.monotonic()))
        while shell["parent_header"].get("msg_id") != message_id:
            shell = self.client.get_shell_msg(timeout=max(1.0, deadline - time.monotonic()))
        reply.status = shell["content"]["status"]
        return reply

    def _next(self, deadline: float) -> Any:
        try:
            return self.client.get_iopub_msg(timeout=max(0.1, deadline - time.monotonic()))
        except Empty:
            raise TimeoutError("the cell did not end in time") from None

    @staticmethod
    def _take(message: Any, reply: Reply) -> bool:
        kind, content = message["msg_type"], message["content"]
        if kind == "stream":
            name = "out" if content["name"] == "stdout" else "err"
            setattr(reply, name, getattr(reply, name) + content["text"])
        elif kind in ("display_data", "update_display_data", "execute_result"):
            key = content.get("transient", {}).get("display_id", kind)
            reply.shown[key] = content["data"].get("text/plain", "")
        elif kind == "error":
            reply.ename, reply.evalue = content["ename"], content["evalue"]
        return bool(kind == "status" and content["execution_state"] == "idle")

    def wait_for_output(self, text: str, timeout: float = 30) -> None:
        """Wait until some cell has printed `text`."""
        seen, deadline = "", time.monotonic() + timeout
        while text not in seen:
            message = self._next(deadline)
            if message["msg_type"] == "stream":
                seen += message["content"]["text"]

    def stop(self) -> None:
        """The stop button."""
        self.manager.interrupt_kernel()

    def family(self) -> list[psutil.Process]:
        """The kernel and every process below it, in other sessions too."""
        top = psutil.Process(self.pid)
        return [top, *top.children(recursive=True)]

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):
            self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


def kill_hard(kernel: Kernel) -> list[psutil.Process]:
    """SIGKILL the kernel; the processes of its family that are alive 2 s later."""
    family = kernel.family()
    os.kill(kernel.pid, signal.SIGKILL)
    deadline = time.monotonic() + 2.0
    while alive(family) and time.monotonic() < deadline:
        time.sleep(0.02)
    return alive(family)


@contextlib.contextmanager
def a_kernel(**environ: str) -> Iterator[Kernel]:
    """A kernel for the time of a with block."""
    kernel = Kernel(**environ)
    try:
        yield kernel
    finally:
        kernel.close()


SETUP = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import os, time, torch, torch.distributed as dist
from pardemo import Ranks, launch, report
def rank(): return dist.get_rank()
def reduce():
    x = torch.ones(2)
    dist.all_reduce(x)
    return x.sum().item()
(torch.ones(800, 800) @ torch.ones(800, 800)).sum()  # starts this process's own thread pool
"""
