"""What a run was made with: versions, commit, machine; environment variables by allow-list only."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from ..machine import machine

ROOT = Path(__file__).resolve().parents[2]
# Exact names, never prefixes: a secret in a variable must not land in a record or a notebook.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "KMP_AFFINITY", "MKL_NUM_THREADS", "NCCL_ALGO",
    "NCCL_DEBUG", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_PROTO", "NCCL_SOCKET_IFNAME",
    "OMP_NUM_THREADS", "OMP_PROC_BIND", "OPENBLAS_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_DISTRIBUTED_DEBUG", "TORCH_NCCL_ASYNC_ERROR_HANDLING",
)  # fmt: skip
PACKAGES = ("pardemo", "torch", "numpy", "scipy", "pandas", "papermill")


def environment() -> dict[str, Any]:
    """One JSON-able description of this process's surroundings, taken once per run."""
    here = machine()
    return {
        "machine": dataclasses.asdict(here) | {"devices": here.devices},
        "warnings": here.trust(),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "kernel": platform.release(),
        "affinity": sorted(os.sched_getaffinity(0)),
        "commit": commit(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "program": Path(sys.argv[0]).name,
    }


def machine_id() -> str:
    """A name for this machine that does not tell its host name: do two runs share a machine?"""
    here = machine()
    told = f"{platform.node()}|{here.cpu}|{here.cores}|{here.gpus}"
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def commit() -> str:
    """The commit of the clone this package lies in, "+changes" where files differ; else "" ."""
    try:
        head = _git("rev-parse", "HEAD").strip()
        return head + ("+changes" if _git("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments],
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    return done.stdout


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"
