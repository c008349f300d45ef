"""The kernel of a notebook that is run: under keeper.py, its files in a folder of its runner."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

KEEPER_S = 15.0  # for keeper.py to end a kernel and all below it


NO_HOME = {
    "MPLCONFIGDIR": "matplotlib",
    "JUPYTER_CONFIG_DIR": "jupyter",
    "JUPYTER_DATA_DIR": "data",
    "JUPYTER_RUNTIME_DIR": "runtime",
}


def homes(folder: Path) -> dict[str, str]:
    """Variables that keep in `folder` what IPython writes, and where the home may not be written
    also what matplotlib and Jupyter do: matplotlib would make a temporary folder of its own, with a
    warning, and leave it; JupyterLab would not start."""
    wanted = {"IPYTHONDIR": "ipython"}
    if not os.access(os.path.expanduser("~"), os.W_OK):
        wanted |= NO_HOME
    return {name: str(folder / sub) for name, sub in wanted.items() if name not in os.environ}


@contextlib.contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """For the time of a with block, this process and what it starts have these variables."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def kernels_in(folder: Path) -> Iterator[None]:
    """For the time of a with block, kernels are at home in `folder`; they are gone when it ends,
    also one that was just starting when a stop came: without its folder it would make another."""
    try:
        with variables(homes(folder)):
            yield
    finally:
        keepers = []
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):  # it has just ended
                if str(folder) in child.cmdline():
                    child.terminate()
                    keepers.append(child)
        psutil.wait_procs(keepers, timeout=KEEPER_S)


def kept(folder: Path) -> Any:
    """The class that starts a kernel under keeper.py: what it started ends with it.

    Its connection file is in `folder`: a stop while a kernel starts would leave it elsewhere.
    """
    from jupyter_client import AsyncKernelManager

    class Kept(AsyncKernelManager):
        def __init__(self, **options: Any) -> None:
            super().__init__(connection_file=str(folder / "kernel.json"), **options)

        def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
            program = str(Path(__file__).with_name("keeper.py"))
            keeper = [sys.executable, "-I", "-S", program, str(folder)]
            return keeper + super().format_kernel_cmd(extra_arguments)

        async def _async_interrupt_kernel(self) -> None:
            """Not on the way to a shutdown: nothing runs then, and an idle kernel would print that
            it was interrupted, after a notebook that went well."""
            if not self.shutting_down:
                await super()._async_interrupt_kernel()

        async def shutdown_kernel(  # type: ignore[override]
            self, now: bool = False, restart: bool = False
        ) -> None:
            """Where something still waits for a cell, end that first: it would say the kernel died.
            Then end the kernel by its keeper: asked politely, it would be interrupted and print
            what its cell meets while its sockets close."""
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            if others and self.provisioner is not None:
                await self.provisioner.terminate()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.provisioner.wait(), KEEPER_S)
                now = True
            await super().shutdown_kernel(now=now, restart=restart)

    return Kept
