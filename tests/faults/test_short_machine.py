"""A machine that is short of something: pardemo works there.

One core, few descriptors, a tiny /dev/shm, a read-only home, no network, no entry for the host
name, a path with spaces and letters beyond ASCII, a user who is not root. Each runs `pardemo
machine`, a launch of two ranks, and records: in namespaces and as another user, nothing patched.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from pardemo import notebooks

from .harness import ROOT, left_in

pytestmark = pytest.mark.timeout(180)
NOBODY = 65534
WORK = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from pardemo import cli, launch, records

def total():
    value = torch.ones(300_000)  # more than a megabyte
    dist.all_reduce(value)  # moves its bytes between the ranks
    return value.sum().item()

def main():
    assert cli.main(["machine"]) == 0
    assert list(launch(total, nprocs=2, timeout=90)) == [600_000.0] * 2
    with records.open("results/pardemo.sqlite").begin("short") as run:
        run.add("case", {"value": 1})
    assert cli.main(["records", "last"]) == 0
    print("it works")

main()
"""
INSIDE = {  # name -> what a shell does before the program, as root of namespaces of its own
    "one core": "taskset -c 0",
    "64 descriptors": "prlimit --nofile=64:64",
    "1 MB of /dev/shm": "mount -t tmpfs -o size=1m tmpfs /dev/shm &&",
    "a read-only home": "mount -t tmpfs -o ro tmpfs home && HOME=$PWD/home",
    "no network but loopback": "ip link set lo up &&",
    "no entry for the host name": "hostname nobody-knows-me && mount --bind $HOSTS /etc/hosts &&",
}


def run(
    folder: Path, before: str, *, user: int = 0, network: bool = True, source: str = WORK
) -> subprocess.CompletedProcess[str]:
    """Run the work in `folder`, in namespaces of its own, after the shell's `before`."""
    (folder / "work.py").write_text(textwrap.dedent(source))
    (folder / "home").mkdir()
    (folder / "hosts").write_text("127.0.0.1 localhost\n")
    mapped = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    words = ["unshare", *mapped, "--mount", "--uts", *([] if network else ["--net"])]
    assert subprocess.run([*words, "true"], capture_output=True).returncode == 0, (
        "these tests need root or user namespaces"
    )
    drop = f"setpriv --reuid={user} --regid={user} --clear-groups" if user else ""
    return subprocess.run(
        [*words, "sh", "-c", f'{before} {drop} "$PYTHON" work.py'],
        cwd=folder, capture_output=True, text=True, timeout=150,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOSTS": str(folder / "hosts"),
             "PYTHONDONTWRITEBYTECODE": "1", "PYTHON": sys.executable},
    )  # fmt: skip


@pytest.mark.parametrize("short", INSIDE)
def test_it_works_where_something_is_short(short: str, tmp_path: Path) -> None:
    done = run(tmp_path, INSIDE[short], network="network" not in short)
    assert done.stdout.endswith("it works\n"), done.stderr


def collected(limits: str) -> subprocess.CompletedProcess[str]:
    """What pytest says of the tests themselves under these limits on open files."""
    return subprocess.run(
        ["prlimit", f"--nofile={limits}", sys.executable, "-m", "pytest", "-q", "--collect-only",
         "tests/test_data.py"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_the_tests_themselves_raise_a_low_limit_or_say_what_they_need() -> None:
    assert collected("64:4096").returncode == 0
    done = collected("64:64")
    assert done.returncode == 2
    assert "the tests need 256 open files at a time, and 64 are allowed" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_notebook_leaves_nothing_where_the_home_cannot_be_written(tmp_path: Path) -> None:
    """IPython and matplotlib make temporary folders there, warn of them, and leave them: seen as
    `tmp*` without `kernels.homes`."""
    (tmp_path / "tmp").mkdir()
    cell = "import os, signal, matplotlib.pyplot\nos.kill(os.getpid(), signal.SIGKILL)"
    book = new_notebook(cells=[new_code_cell(cell)])
    book.metadata["kernelspec"] = dict(notebooks.KERNEL)
    nbformat.write(book, tmp_path / "book.ipynb")
    source = (
        "import pathlib\nfrom pardemo import notebooks\n"
        "try: notebooks.execute(pathlib.Path('book.ipynb').resolve())\n"
        "except notebooks.NotebookFailed as error: print(error)\n"
        "print('it works')\n"
    )
    done = run(tmp_path, f"{INSIDE['a read-only home']} TMPDIR=$PWD/tmp", source=source)
    assert "its kernel died" in done.stdout, done.stderr
    assert "not a writable location" not in done.stderr
    assert left_in(tmp_path / "tmp") == []


def test_the_lab_opens_where_the_home_cannot_be_written(tmp_path: Path) -> None:
    """Jupyter wants a folder there before it does anything: seen to fail without `kernels.homes`"""
    (tmp_path / "tmp").mkdir()
    source = """
        import os, re, signal, subprocess, sys, time
        words = [sys.executable, "-m", "pardemo", "lab", "--no-browser"]
        with open("said", "w") as said:
            lab = subprocess.Popen(words, stdout=said, stderr=said)
        found, until = None, time.monotonic() + 100
        while lab.poll() is None and not found and time.monotonic() < until:
            time.sleep(0.2)
            found = re.search("http://127.0.0.1:[0-9]+/lab", open("said").read())
        lab.send_signal(signal.SIGTERM)
        lab.wait()
        print(open("said").read())
        print("it works" if found else "no address")
    """
    before = INSIDE["a read-only home"]
    done = run(tmp_path, f"{before} TMPDIR=$PWD/tmp", source=source)
    assert done.stdout.endswith("it works\n"), done.stdout + done.stderr
    assert left_in(tmp_path / "tmp") == []


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user can reach, with a name that is awkward in every way."""
    folder = Path("/var/tmp") / f"pardemo {os.getpid()} é$x'y" / "ü b"
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder.parent)


def test_a_path_with_spaces_quotes_and_other_letters(open_folder: Path) -> None:
    done = run(open_folder, "")
    assert done.stdout.endswith("it works\n"), done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="runs as another user, which only root can start")
def test_a_user_who_is_not_root_and_has_no_home(open_folder: Path) -> None:
    """He can read Python and the package, and write to his folder only."""
    os.chown(open_folder, NOBODY, NOBODY)
    done = run(open_folder, f"{reachable(open_folder)} HOME=/nowhere TMPDIR=/tmp", user=NOBODY)
    assert done.stdout.endswith("it works\n"), done.stderr


def reachable(folder: Path) -> str:
    """Shell words after which any user can reach this Python and this clone, in a namespace.

    Where they lie below a private folder (a pyenv in /root), that is covered, and they alone are
    put back.
    """
    needed = {Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), ROOT}
    words = ""
    private = {
        parent
        for path in needed
        for parent in [path, *path.parents]
        if not parent.stat().st_mode & 0o001
    }
    for top in [p for p in private if not private & set(p.parents)]:
        below = [path for path in needed if path.is_relative_to(top)]
        for number, path in enumerate(below):
            stash = folder.parent / f"stash{number}"
            stash.mkdir()
            words += shlex.join(["mount", "--bind", str(path), str(stash)]) + " && "
        words += shlex.join(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(top)]) + " && "
        for number, path in enumerate(below):
            stash = folder.parent / f"stash{number}"
            words += shlex.join(["mkdir", "-p", str(path)]) + " && "
            words += shlex.join(["mount", "--bind", str(stash), str(path)]) + " && "
    return words
