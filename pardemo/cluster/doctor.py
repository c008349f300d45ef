"""Can these nodes train together? Looks at each thing that usually prevents it, with its remedy.

    pardemo doctor                                        # this machine alone
    srun pardemo doctor --nodes n1:29400 n2:29400         # the same command on every node

With --nodes, every node runs the same command at about the same time, as with torchrun. They meet
on the given ports, compare what they are, then every pair does a real 2-rank all-reduce (which
needs port + 1 for its store, and any port for gloo's own connections).
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

OK, WARN, FAIL = "ok", "WARN", "FAIL"
SHM_BYTES = 256 * 2**20  # DataLoader workers and nccl pass tensors through /dev/shm
FILES = 4096
MEMORY_BYTES = 4 * 2**30
CLOCK_S = 1.0
VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True)
class Finding:
    """One thing looked at: `level` is ok, WARN or FAIL; the last two come with a remedy."""

    level: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:4}  {self.text}" + (f"\n      -> {self.remedy}" if self.remedy else "")


def interfaces() -> dict[str, list[str]]:
    """IPv4 addresses of each interface that is up."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    return {
        name: [a.address for a in addresses if a.family == socket.AF_INET]
        for name, addresses in psutil.net_if_addrs().items()
        if name in up
    }


def facts() -> dict[str, Any]:
    """What is compared between nodes: versions and hardware, nothing secret."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpus else "",
        "gpus": gpus,
    }


def here(environment: Mapping[str, str] | None = None) -> list[Finding]:
    """Findings about this machine alone."""
    environment = os.environ if environment is None else environment
    found = [_name(), *_named_interfaces(environment), _shared_memory(), _open_files()]
    return [*found, _memory(), *_locked_memory(), *_peers(), *slurm(environment)]


def _name() -> Finding:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return Finding(
            WARN, f"this machine's name, {name}, does not resolve",
            "add it to /etc/hosts or DNS, or give addresses instead of names",
        )  # fmt: skip
    if address.startswith("127."):
        return Finding(
            WARN, f"this machine's name, {name}, resolves to {address}, which other nodes cannot "
            "reach; gloo listens there unless told otherwise",
            "set GLOO_SOCKET_IFNAME to the interface between the nodes, and give --master-addr as "
            "an address; or correct /etc/hosts",
        )  # fmt: skip
    return Finding(OK, f"this machine is {name}, {address}")


def _named_interfaces(environment: Mapping[str, str]) -> list[Finding]:
    there = interfaces()
    outward = [name for name, addresses in there.items() if name != "lo" and addresses]
    found = []
    for variable in VARIABLES:
        value = environment.get(variable, "")
        if value and not value.startswith("^") and not meant(variable, value, there):
            found.append(
                Finding(
                    FAIL, f"{variable}={value}, but no interface of that name is up",
                    f"there are: {', '.join(there)}",
                )
            )  # fmt: skip
    if not environment.get(VARIABLES[0]) and len(outward) > 1:
        found.append(
            Finding(
                WARN, f"interfaces {', '.join(outward)}, and GLOO_SOCKET_IFNAME is not set",
                "set it, and NCCL_SOCKET_IFNAME, to the one between the nodes",
            )
        )  # fmt: skip
    named = ", ".join(f"{name} {' '.join(a)}" for name, a in there.items() if a)
    return found or [Finding(OK, f"interfaces: {named}")]


def meant(variable: str, value: str, there: Mapping[str, list[str]]) -> list[str]:
    """The interfaces that a variable means: gloo wants whole names, nccl beginnings (=: whole)."""
    begins = variable.startswith("NCCL") and not value.startswith("=")
    names = value.lstrip("=").split(",")
    return [n for n in there if any(n.startswith(x) if begins else n == x for x in names if x)]


def _shared_memory() -> Finding:
    if not Path("/dev/shm").is_dir():
        return Finding(WARN, "there is no /dev/shm", "mount a tmpfs there")
    total = shutil.disk_usage("/dev/shm").total
    if total < SHM_BYTES:
        return Finding(
            WARN, f"/dev/shm has {total / 1e6:.0f} MB: DataLoader workers and nccl may fail",
            "docker run --shm-size=8g; Kubernetes: an emptyDir with medium Memory on /dev/shm",
        )  # fmt: skip
    return Finding(OK, f"/dev/shm has {total / 1e9:.1f} GB")


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < FILES:
        return Finding(
            WARN, f"a process may open {soft} files: many ranks and workers need more",
            f"ulimit -n {FILES if hard < 0 else min(FILES, hard)}, or raise it in limits.conf",
        )  # fmt: skip
    return Finding(OK, f"a process may open {soft:,} files")


def _memory() -> Finding:
    """What a process may use: by ulimit -v, by its cgroup (containers, Slurm), by the machine."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        return Finding(
            WARN, f"a process may map {soft / 1e9:.1f} GB: torch maps far more than it uses, and "
            "fails with odd errors", "ulimit -v unlimited, or raise it in limits.conf",
        )  # fmt: skip
    total = psutil.virtual_memory().total
    allowed = min([total, *_cgroup_limits()])
    if allowed < MEMORY_BYTES:
        return Finding(
            WARN, f"{allowed / 1e9:.1f} GB of memory may be used here: beyond, ranks are killed",
            "ask for more: docker run --memory, Kubernetes limits, sbatch --mem",
        )  # fmt: skip
    return Finding(OK, f"{allowed / 1e9:.1f} GB of memory may be used, {total / 1e9:.1f} are there")


def _cgroup_limits(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Memory limits of this process's cgroup and those above it, in bytes."""
    try:
        own = Path("/proc/self/cgroup").read_text().strip().splitlines()[-1].split(":")[2]
    except (OSError, IndexError):
        return []
    here = root / own.strip("/")
    found = []
    for folder in (here, *here.parents):
        for name in ("memory.max", "memory/memory.limit_in_bytes"):
            file = folder / name
            if file.is_relative_to(root) and file.is_file():
                text = file.read_text().strip()
                found += [int(text)] if text.isdecimal() else []
    return found


def _locked_memory() -> list[Finding]:
    """Only InfiniBand needs much locked memory."""
    if not any(Path("/sys/class/infiniband").glob("*")):
        return []
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY:
        return [
            Finding(
                FAIL, f"InfiniBand is here, and a process may lock {soft / 1e6:.1f} MB only",
                "ulimit -l unlimited; for Slurm: LimitMEMLOCK=infinity in slurmd's unit",
            )
        ]  # fmt: skip
    return [Finding(OK, "InfiniBand is here, and memory may be locked without limit")]


def _peers() -> list[Finding]:
    from pardemo.machine import machine

    links = machine().links
    if not links:
        return []
    with_access, _, all_pairs = links.removeprefix("peer access between ").partition(" of ")
    if with_access == all_pairs.split()[0]:
        return [Finding(OK, f"GPUs: {links}")]
    return [
        Finding(
            WARN, f"GPUs: {links}; the others copy through the host",
            "nvidia-smi topo -m shows why; in a virtual machine, ACS and IOMMU settings decide",
        )
    ]  # fmt: skip


def slurm(environment: Mapping[str, str]) -> list[Finding]:
    """Nodes on which Slurm starts nothing, so that jobs wait; nothing where there is no Slurm."""
    if shutil.which("sinfo") is None:
        return []
    argv = ["sinfo", "--noheader", "--Node", "--format=%N|%T|%E"]
    try:
        done = subprocess.run(
            argv, env=dict(environment), text=True, capture_output=True, timeout=15,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        said, failed = done.stderr, done.returncode != 0
    except subprocess.TimeoutExpired:
        said, failed = "no answer in 15 s", True
    if "configuration" in said:  # installed, and never set up
        return []
    if failed:
        text = f"Slurm's controller does not answer: {' '.join(said.split())[:200]}"
        return [Finding(WARN, text, "`scontrol ping` says which host; start slurmctld there")]
    rows = dict.fromkeys(line for line in done.stdout.splitlines() if line.count("|") >= 2)
    found = []
    for name, state, reason in (row.split("|", 2) for row in rows):
        if state.startswith(("drain", "down", "fail")):
            found.append(
                Finding(
                    WARN, f"Slurm starts nothing on node {name}: it is {state.rstrip('*')} "
                    f"({reason}); jobs that need it stay pending",
                    f"scontrol update nodename={name} state=resume once it is mended, or ask for "
                    "fewer nodes",
                )
            )  # fmt: skip
    return found or [Finding(OK, f"Slurm can use its {len(rows)} nodes")]


def compare(mine: Mapping[str, Any], theirs: Mapping[str, Any], clock_s: float) -> list[Finding]:
    """What differs between this node and another; `clock_s`: how far its clock is ahead."""
    found = []
    for name, remedy in (
        ("torch", "install the same version everywhere: pip install -c constraints.txt"),
        ("nccl", "nccl must be the same everywhere: install the same torch"),
    ):
        if mine[name] != theirs[name]:
            text = f"{name} is {mine[name]} here and {theirs[name]} on {theirs['host']}"
            found.append(Finding(FAIL, text, remedy))
    if mine["python"].rsplit(".", 1)[0] != theirs["python"].rsplit(".", 1)[0]:
        found.append(
            Finding(
                WARN, f"Python is {mine['python']} here and {theirs['python']} on {theirs['host']}",
                "functions that are sent between them may not unpickle: use one version",
            )
        )  # fmt: skip
    if mine["gpus"] != theirs["gpus"]:
        text = f"{mine['gpus']} GPUs here and {theirs['gpus']} on {theirs['host']}"
        found.append(Finding(WARN, text, "give each node its own --nproc-per-node"))
    if abs(clock_s) > CLOCK_S:
        text = f"the clock of {theirs['host']} is {clock_s:+.1f} s away from this one"
        found.append(Finding(WARN, text, "logs will not line up: run chrony or ntpd on both"))
    return found or [Finding(OK, f"{theirs['host']} has the same versions; clocks agree")]
