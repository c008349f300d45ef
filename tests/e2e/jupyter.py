"""A real JupyterLab in a real browser: start the server, open a notebook, run it, read its cells.

Chromium comes from the system (`apt-get install chromium`), playwright from the extra `e2e`.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pardemo import lab

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
READY = """() => {
  const panel = window.jupyterapp && jupyterapp.shell.currentWidget;
  const context = panel && panel.sessionContext;
  return Boolean(context && context.isReady && context.session
                 && context.session.kernel && context.session.kernel.status === 'idle');
}"""
CELLS = """() => jupyterapp.shell.currentWidget.content.widgets
  .filter(w => w.model.type === 'code')
  .map(w => ({source: w.model.sharedModel.source, count: w.model.executionCount,
              outputs: w.model.outputs.toJSON()}))"""


def chromium() -> str | None:
    """The system's Chromium, or None."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@dataclass(frozen=True)
class Server:
    """A running JupyterLab on loopback, serving copies of the notebooks."""

    url: str
    token: str
    root: Path
    pid: int

    def page(self, notebook: str) -> str:
        """The address of one notebook in a workspace of its own."""
        name = secrets.token_hex(4)
        return f"{self.url}/lab/workspaces/auto-{name}/tree/{notebook}?token={self.token}"


def free_port() -> int:
    """A loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(root: Path) -> Iterator[Server]:
    """JupyterLab as `pardemo lab` sets it up, on copies of the lessons under `root`."""
    for folder in ("notebooks", "benchmarks"):
        shutil.copytree(ROOT / folder, root / folder, dirs_exist_ok=True)
    port, token = free_port(), secrets.token_hex(8)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"]
    command += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    command += [f"--ServerApp.root_dir={root}", "--expose-app-in-browser"]
    settings = root / ".settings"
    settings.mkdir()
    with (root / ".lab.log").open("w") as log:
        process = subprocess.Popen(
            command, env=lab.environment(settings), cwd=root, stdout=log, stderr=log
        )
        try:
            found = Server(f"http://127.0.0.1:{port}", token, root, process.pid)
            _wait_for(found, process)
            yield found
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            process.kill()


def _wait_for(found: Server, process: subprocess.Popen[bytes]) -> None:
    for _ in range(720):
        if process.poll() is not None:
            raise RuntimeError(f"JupyterLab ended: {(found.root / '.lab.log').read_text()[-800:]}")
        with contextlib.suppress(OSError):
            address = f"{found.url}/api/status?token={found.token}"
            with urllib.request.urlopen(address, timeout=2) as answer:
                json.load(answer)
                return
        time.sleep(0.25)
    raise RuntimeError("JupyterLab did not answer within 180 s")


def open_notebook(page: Any, found: Server, notebook: str) -> None:
    """Open a notebook and wait until its kernel is idle (before that, Run All asks for one)."""
    page.goto(found.page(notebook))
    page.wait_for_selector("#jupyterlab-splash", state="detached", timeout=120_000)
    page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=120_000)
    page.wait_for_function(READY, timeout=120_000)


def run_all(page: Any, timeout_s: float) -> None:
    """Run every cell and wait for the end."""
    page.set_default_timeout(timeout_s * 1000)
    page.evaluate("async () => { await jupyterapp.commands.execute('notebook:run-all-cells'); }")


def cells(page: Any) -> list[dict[str, Any]]:
    """Source, execution count and outputs of every code cell, from the notebook's model."""
    return page.evaluate(CELLS)  # type: ignore[no-any-return]
