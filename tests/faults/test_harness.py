"""The harness finds what is left: a check that cannot fail would prove nothing."""

from __future__ import annotations

import signal
import socket
import subprocess
from pathlib import Path

import psutil
import pytest

from .harness import Program, gone_within, nothing_left

ORPHAN = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"],
                         start_new_session=True)
print("ready", child.pid)
time.sleep(60)
"""


def leave_a_process(folder: Path) -> object:
    return subprocess.Popen(["sleep", "60"])


def leave_a_listener(folder: Path) -> object:
    return socket.create_server(("127.0.0.1", 0))


def leave_a_descriptor(folder: Path) -> object:
    return open("/dev/null")


def leave_shared_memory(folder: Path) -> object:
    from multiprocessing.shared_memory import SharedMemory

    made = SharedMemory(create=True, size=16)
    made.close()
    return made


def leave_a_file(folder: Path) -> object:
    import tempfile

    return tempfile.mkdtemp()


LEAVES = {
    "processes": leave_a_process,
    "listeners": leave_a_listener,
    "descriptors": leave_a_descriptor,
    "shared_memory": leave_shared_memory,
    "temporary": leave_a_file,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", LEAVES)
def test_whatever_is_left_is_found(tmp_path: Path, what: str) -> None:
    with pytest.raises(AssertionError, match=what), nothing_left(tmp_path, within_s=0.2) as folder:
        left = LEAVES[what](folder)
    if what == "processes":
        left.wait()  # type: ignore[attr-defined]
    elif what == "listeners" or what == "descriptors":
        left.close()  # type: ignore[attr-defined]
    elif what == "shared_memory":
        left.unlink()  # type: ignore[attr-defined]


@pytest.mark.timeout(60)
def test_an_orphan_of_a_killed_program_is_found_in_another_session(tmp_path: Path) -> None:
    orphans: list[psutil.Process] = []

    def leave_an_orphan() -> None:
        with nothing_left(tmp_path, within_s=0.2):
            program = Program(tmp_path, ORPHAN)
            program.wait_for("ready")
            orphans.append(psutil.Process(int(program.out.split()[1])))
            program.send(signal.SIGKILL)
            assert program.end() == -signal.SIGKILL
            assert gone_within(orphans, 0.1) == orphans

    with pytest.raises(AssertionError, match=r"left behind: .*time\.sleep"):
        leave_an_orphan()
    assert gone_within(orphans, 5) == []


@pytest.mark.timeout(60)
def test_a_fault_that_leaves_nothing_passes(tmp_path: Path) -> None:
    with nothing_left(tmp_path) as folder:
        (folder / "made").write_text("and removed")
        (folder / "made").unlink()
        program = Program(tmp_path, "import sys; print('ready'); sys.exit(3)")
        assert (program.end(), program.out) == (3, "ready\n")


@pytest.mark.timeout(60)
def test_what_a_failing_test_has_started_is_ended(tmp_path: Path) -> None:
    family: list[psutil.Process] = []

    def fail() -> None:
        with nothing_left(tmp_path) as temporary:
            program = Program(temporary, ORPHAN)
            program.wait_for("ready")
            family.extend(program.family())
            raise AssertionError("planted")

    with pytest.raises(AssertionError, match="planted"):
        fail()
    assert len(family) == 2
    assert gone_within(family, 5.0) == []
