"""`pardemo lab`: JupyterLab on the first lesson, on loopback, behind its token, without prompts."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from . import scratch
from .kernels import homes
from .notebooks import ROOT
from .parameters import Refused
from .versions import misfit

FIRST = "notebooks/00_start_here.ipynb"
SETTINGS = {
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
PR_SET_PDEATHSIG = 1
END_S = 20.0  # for the server to end its kernels
KERNEL_CONFIG = "c = get_config()\nc.IPKernelApp.log_level = 40\n"


def command(port: int | None = None, browser: bool = True) -> list[str]:
    """The JupyterLab command line: 127.0.0.1 only; the token stays on, made by the server."""
    made = [sys.executable, "-m", "jupyterlab", "--ServerApp.ip=127.0.0.1"]
    made += [f"--ServerApp.root_dir={ROOT}", f"--LabApp.default_url=/lab/tree/{FIRST}"]
    if port is not None:
        made += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    if not browser:
        made.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        made.append("--allow-root")
    return made


def environment(folder: Path) -> dict[str, str]:
    """This environment, with the news prompt off and kernels that do not warn of loopback TCP.

    The reader's own settings stay where they are: these lie in `folder`, gone afterwards.
    """
    profile = folder / "ipython" / "profile_default"
    profile.mkdir(parents=True)
    (profile / "ipython_kernel_config.py").write_text(KERNEL_CONFIG)
    settings = folder / "settings"
    for name, values in SETTINGS.items():
        file = settings / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    paths = {"IPYTHONDIR": folder / "ipython", "JUPYTERLAB_SETTINGS_DIR": settings}
    own = {key: str(value) for key, value in paths.items()}
    return {**os.environ, **homes(folder), **own}


def _end_with_parent() -> None:
    """In the server's process, before it starts: SIGTERM when `pardemo lab` is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def run(port: int | None = None, browser: bool = True) -> int:
    """Open JupyterLab and stay until it ends; returns its exit code.

    The server ends with this process, also when that is killed: nothing goes on listening.
    """
    if port is not None and not 1024 <= port <= 65535:
        raise Refused(
            f"--port is 1024 to 65535, not {port}; without it the first free one is taken"
        )
    if said := misfit("jupyter-server"):
        raise Refused(said)
    if not (ROOT / FIRST).exists():
        raise Refused(f"{ROOT / FIRST} is missing: run pardemo lab from a clone of the repository")
    with scratch.folder() as folder:
        server = subprocess.Popen(
            command(port, browser),
            env=environment(folder),
            cwd=str(ROOT),
            preexec_fn=_end_with_parent,
        )
        try:
            return server.wait()
        except KeyboardInterrupt as stop:
            server.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(timeout=END_S)
            if stop.args:  # SIGTERM, SIGHUP: not the reader's own way to end it
                raise
            return 0
        finally:
            if server.poll() is None:
                server.kill()
                server.wait()
