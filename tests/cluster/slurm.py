"""A real Slurm for one test run: two slurmd on one machine, on loopback, in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

CONFIG = """
ClusterName=pardemo
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/sock/s,cred_expire=10
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=5
InactiveLimit=0
FirstJobId={first}
Waittime=0
SchedulerParameters=bf_interval=2,sched_interval=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=2 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=2 RealMemory=1000
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=60 State=UP
"""


class Slurm:
    """munged, slurmctld and two slurmd of this user; `stop` ends them and what they started."""

    def __init__(self, root: Path) -> None:
        self.root, user = root, os.environ.get("USER") or "root"
        for name in ("munge", "sock", "state", "log", "spool.n1", "spool.n2"):
            (root / name).mkdir(mode=0o755 if name == "sock" else 0o700)
        root.chmod(0o755)
        key = root / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        ports = [_free_port() for _ in range(3)]
        self.config = root / "slurm.conf"
        self.config.write_text(
            CONFIG.format(
                host=socket.gethostname().split(".")[0], user=user, root=root,
                port=ports[0], port1=ports[1], port2=ports[2],
                first=ports[0] % 9000 + 1,  # jobs of two Slurms do not meet at a port
            )
        )  # fmt: skip
        self.env = {**os.environ, "SLURM_CONF": str(self.config)}
        self.processes: list[subprocess.Popen[bytes]] = []
        try:
            self._come_up()
        except BaseException:
            self.stop()
            raise

    def _come_up(self) -> None:
        root, key, where = self.root, self.root / "munge" / "key", self.root / "munge"
        self._start(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={root}/sock/s",
            f"--pid-file={where}/pid", f"--log-file={where}/log", f"--seed-file={where}/seed",
        )  # fmt: skip
        time.sleep(1.0)
        self._start("slurmctld", "-D", "-f", str(self.config))
        for node in ("n1", "n2"):
            self.start_node(node)
        self._wait_idle()

    def start_node(self, node: str) -> None:
        self._start("slurmd", "-D", "-f", str(self.config), "-N", node)

    def tasks(self, node: str) -> list[psutil.Process]:
        """The processes of this Slurm's jobs on a node: tasks, and the stepd above them."""
        found = {}
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                here = environment.get("SLURM_CONF") == str(self.config)
                if here and environment.get("SLURMD_NODENAME") == node:
                    above = [p for p in process.parents() if p.name().startswith("slurmstepd")]
                    found |= {p.pid: p for p in (process, *above)}
            except psutil.Error:
                continue
        return list(found.values())

    def lose_node(self, node: str) -> None:
        """SIGKILL a node's slurmd and all it runs, as a power cut does.

        They are stopped first: none may see another end, and tell Slurm.
        """
        daemon = next(p for p in self.processes if p.args[-1] == node)  # type: ignore[index]
        daemon.send_signal(signal.SIGSTOP)
        stopped: dict[int, psutil.Process] = {}
        while new := [p for p in self.tasks(node) if p.pid not in stopped]:
            for process in new:
                stopped[process.pid] = process
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.suspend()
        for process in stopped.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        daemon.kill()
        daemon.wait()
        self.processes.remove(daemon)

    def _start(self, name: str, *arguments: str) -> None:
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        with (self.root / "log" / f"{name}.out").open("ab") as log:
            self.processes.append(
                subprocess.Popen(
                    [name, *arguments], env={**self.env, "PATH": path}, stdout=log, stderr=log,
                    stdin=subprocess.DEVNULL, start_new_session=True,
                )
            )  # fmt: skip

    def run(self, *argv: str, timeout: float = 60.0) -> str:
        done = subprocess.run(
            argv, env=self.env, text=True, capture_output=True, timeout=timeout,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _wait_idle(self) -> None:
        said = ""
        for _ in range(60):
            done = subprocess.run(
                ["sinfo", "-h", "-o", "%T %D"], env=self.env, text=True, capture_output=True
            )
            said = done.stdout + done.stderr
            if done.stdout.strip() == "idle 2":
                return
            time.sleep(0.5)
        self.stop()
        logs = "".join(p.read_text()[-800:] for p in (self.root / "log").iterdir())
        pytest.skip(f"Slurm is installed, but its nodes did not come up here: {said} {logs}")

    def state(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", job)))

    def wait(self, job: str, timeout: float = 120.0) -> dict[str, str]:
        """The job's fields once it has ended, however."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            state = self.state(job)
            if state["JobState"] not in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"):
                return state
            time.sleep(0.5)
        raise AssertionError(f"job {job} is still {self.state(job)['JobState']}")

    def stop(self) -> None:
        for process in [*self.tasks("n1"), *self.tasks("n2")]:  # of a test that was interrupted
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
