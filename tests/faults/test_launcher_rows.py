"""The launcher under planted faults: every one ends in time, names its cause, leaves nothing.

Signals come from the test, by process id, at least three times each; `make soak` has twenty.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pardemo.launch import RankFailed, Ranks, RankTimeout, launch, servers
from pardemo.launch import session as sessions

from .harness import Program, alive, gone_within, nothing_left
from .launcher_work import (
    asks_for_too_much,
    block,
    deaf_in_c,
    drags,
    imports_for_ever,
    leaves_a_daemon,
    leaves_memory,
    many_sums,
    other_order,
    other_shape,
    raises_at_a_step,
    returns_early,
    start_daemon,
    total,
    values,
    wait_and_sum,
)
from .test_random_moments import SPAWNS

pytestmark = pytest.mark.timeout(300)
MANY = [3, pytest.param(20, marks=[pytest.mark.soak, pytest.mark.timeout(900)])]
WITHIN_S = 5.0


def hit_when_it_runs(pid: int, signum: int, folder: Path, ranks: int = 2) -> threading.Thread:
    """Send a signal to a rank as soon as all have said, in `folder`, that they run."""

    def wait_and_hit() -> None:
        while len(list(folder.glob("rank-*"))) < ranks:
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(pid, signum)

    thread = threading.Thread(target=wait_and_hit)
    thread.start()
    return thread


def blamed(
    fn: Callable[..., object],
    *args: object,
    timeout: float = 60.0,
    either: bool = False,
    start: str = "forkserver",
) -> RankFailed:
    """What two ranks that run `fn` end in: it names rank 1.

    `either`: of two that disagree, nobody can say which one is wrong.
    """
    with pytest.raises(RankFailed) as caught:
        launch(fn, *args, nprocs=2, timeout=timeout, start=start, echo=False)
    assert either or caught.value.rank == 1, caught.value
    assert len(caught.value.ranks) == 2
    return caught.value


def blamed_when_hit(folder: Path, signum: int, timeout: float = 60.0) -> RankFailed:
    """What two blocked ranks end in, of which rank 1 gets a signal. Found soon enough."""
    marks = Path(tempfile.mkdtemp(dir=folder))
    with Ranks(2, timeout=timeout, echo=False) as ranks:
        ranks(total)
        thread = hit_when_it_runs(ranks.status()[1]["pid"], signum, marks)
        began = time.monotonic()
        with pytest.raises(RankFailed) as caught:
            ranks(block, str(marks))
        assert time.monotonic() - began < WITHIN_S + (timeout if timeout < 60 else 0)
        thread.join()
    assert caught.value.rank == 1, caught.value
    return caught.value


@pytest.mark.parametrize("times", MANY)
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_row_1_a_rank_is_killed(tmp_path: Path, signum: signal.Signals, times: int) -> None:
    with nothing_left(tmp_path):
        for _ in range(times):
            error = blamed_when_hit(tmp_path, signum)
            assert f"rank 1 of 2 was killed by signal {signum.name}" in str(error)
            if signum != signal.SIGKILL:  # faulthandler has left its stack
                assert "in block" in error.ranks[1]


@pytest.mark.parametrize("times", MANY)
def test_row_2_a_rank_is_stopped(tmp_path: Path, times: int) -> None:
    with nothing_left(tmp_path):
        for _ in range(times):
            error = blamed_when_hit(tmp_path, signal.SIGSTOP, timeout=1.0)
            assert isinstance(error, RankTimeout)
            assert "its process is stopped" in error.ranks[1]


@pytest.mark.parametrize("times", MANY)
def test_row_3_a_rank_raises(tmp_path: Path, times: int) -> None:
    with nothing_left(tmp_path):
        for _ in range(times):
            error = blamed(raises_at_a_step)
            head = "rank 1 of 2 raised ValueError: planted at step 3\n"
            assert str(error).startswith(head)
            assert "in raises_at_a_step" in error.ranks[1]


@pytest.mark.parametrize("times", MANY)
def test_row_4_an_interrupt_of_one_rank_alone_changes_nothing(tmp_path: Path, times: int) -> None:
    """Ranks ignore SIGINT: the kernel decides. torch's own spawn would report a success."""

    with nothing_left(tmp_path), Ranks(2, echo=False) as ranks:
        for _ in range(times):
            marks = Path(tempfile.mkdtemp(dir=tmp_path))
            thread = hit_when_it_runs(ranks.status()[1]["pid"], signal.SIGINT, marks)
            assert list(ranks(wait_and_sum, str(marks))) == [6.0, 6.0]
            thread.join()


@pytest.mark.twenty
def test_row_4_a_rank_that_returns_early_is_not_a_success(tmp_path: Path) -> None:
    with nothing_left(tmp_path):
        assert "rank 1 of 2 returned while rank 0 waited" in str(blamed(returns_early))


@pytest.mark.twenty
@pytest.mark.parametrize(
    ("fn", "says"), [(other_shape, "all_reduce(8 Float"), (other_order, "broadcast")]
)
def test_row_5_collectives_that_do_not_match(
    tmp_path: Path, fn: Callable[[], object], says: str
) -> None:
    with nothing_left(tmp_path):
        assert f"rank 1 called {says}" in str(blamed(fn, timeout=3.0, either=True))


@pytest.mark.twenty
def test_row_9_a_rank_that_hears_nothing_is_ended(tmp_path: Path) -> None:
    with nothing_left(tmp_path, within_s=3.0):
        assert "did not come" in str(blamed(deaf_in_c, timeout=1.0))


@pytest.mark.twenty
def test_row_10_a_hang_in_an_import_shows_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "never_ready.py").write_text("import time\ntime.sleep(600)  # planted\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with nothing_left(tmp_path):
        error = blamed(imports_for_ever, timeout=1.0)
        assert "never_ready.py" in error.ranks[1]
        assert "time.sleep(600)  # planted" in error.ranks[1]


@pytest.mark.twenty
def test_row_10_a_rank_that_does_not_start_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank is stopped before its process group stands."""
    monkeypatch.setattr(sessions, "_START_S", 1.0)
    monkeypatch.setattr(sessions, "_START_EACH_S", 0.0)

    def start_and_stop_one(nprocs: int) -> servers.Started:
        server = servers.fork_server()
        before = {p.pid for p in psutil.Process(server.process.pid).children()}
        started = server.start(nprocs)
        new: list[int] = []
        while len(new) < nprocs:
            children = psutil.Process(server.process.pid).children()
            new = sorted(p.pid for p in children if p.pid not in before)
        os.kill(new[1], signal.SIGSTOP)  # it has had no set-up yet: it waits for one
        return started

    with nothing_left(tmp_path):
        setup = sessions.Setup(2, start=start_and_stop_one)
        with pytest.raises(RankTimeout, match=r"not ready after 1 s: .*rank 1") as caught:
            sessions.Session(setup, echo=False)
        assert caught.value.rank == 1


@pytest.mark.twenty
def test_row_11_a_rank_runs_out_of_memory(tmp_path: Path) -> None:
    with nothing_left(tmp_path):
        assert f"{4 << 30} bytes" in str(blamed(asks_for_too_much))


@pytest.mark.twenty
def test_row_12_too_few_descriptors_are_named(tmp_path: Path) -> None:
    script = """
    import resource
    import torch.distributed as dist
    from pardemo import launch
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    launch(dist.get_rank, nprocs=2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (30, limit[1]))
    try:
        launch(dist.get_rank, nprocs=4)
    except OSError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    print(list(launch(dist.get_rank, nprocs=4)))
    """
    with nothing_left(tmp_path):
        program = Program(tmp_path, script)
        assert program.end(150) == 0, program.err
        said, after = program.out.splitlines()
        assert "4 ranks need" in said
        assert "ulimit -n" in said
        assert after == str(list(range(4)))


@pytest.mark.twenty
def test_row_12_a_fork_server_that_cannot_fork_says_why(tmp_path: Path) -> None:
    """A limit on processes, as the fork server sees it; root is exempt from the real one."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "def full(): raise BlockingIOError(11, 'Resource temporarily unavailable')\n"
        "if 'pardemo.launch.zygote' in sys.orig_argv: os.fork = full\n"
    )
    script = """
    import torch.distributed as dist
    from pardemo import launch
    try:
        launch(dist.get_rank, nprocs=2)
    except RuntimeError as error:
        print(error)
    """
    with nothing_left(tmp_path):
        path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
        program = Program(tmp_path, script, PYTHONPATH=path)
        assert program.end(150) == 0, program.err
        assert "Resource temporarily unavailable" in program.out
        assert "ulimit -u" in program.out


def test_what_cannot_be_loaded_in_advance_is_said_and_done_without(tmp_path: Path) -> None:
    """A part of torch that does not import here; a learner's file named as one of Python's."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'pardemo.launch.zygote' in sys.orig_argv:\n"
        "    sys.modules['torch.distributed.pipelining'] = None\n"
    )
    script = """
    import os, tempfile
    import torch.distributed as dist
    from pardemo import launch
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        open("random.py", "w").write("raise RuntimeError('not this one')")
        print(list(launch(dist.get_rank, nprocs=2)))
    """
    with nothing_left(tmp_path):
        path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
        program = Program(tmp_path, script, PYTHONPATH=path)
        assert program.end(150) == 0, program.err
        assert program.out == "[0, 1]\n"
        (said,) = program.said
        assert said.startswith("note: torch.distributed.pipelining is not loaded in advance")


NEEDS_UNSHARE = pytest.mark.skipif(
    shutil.which("unshare") is None or os.geteuid() != 0,
    reason="needs root and unshare: it mounts, and sets a host name, in a namespace of its own",
)


def in_namespace(inside: str, *kinds: str) -> list[str]:
    """A command prefix that runs a script after the shell line `inside`, in new namespaces."""
    shell = ["sh", "-c", f'{inside} && exec "$0" "$@"', sys.executable]
    return ["unshare", *kinds, *shell]


@pytest.mark.twenty
@NEEDS_UNSHARE
def test_row_12_a_full_dev_shm_and_no_temporary_folder_do_not_matter(tmp_path: Path) -> None:
    script = """
    import os, shutil, tempfile
    folder = tempfile.mkdtemp()
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    shutil.rmtree(folder)
    import torch
    from pardemo import launch
    ones = torch.ones(16_000_000)
    print([value.sum().item() for value in launch(lambda: ones + 1, nprocs=2)])
    """
    with nothing_left(tmp_path):
        full = "mount -t tmpfs -o size=16k tmpfs /dev/shm && head -c 16k /dev/zero >/dev/shm/full"
        program = Program(tmp_path, script, command=in_namespace(full, "--mount"))
        assert program.end(150) == 0, program.err
        assert program.out == "[32000000.0, 32000000.0]\n"


@pytest.mark.twenty
def test_row_13_a_rank_that_is_held_up_is_waited_for(tmp_path: Path) -> None:
    with nothing_left(tmp_path), Ranks(2, echo=False) as ranks:
        pid, done = ranks.status()[1]["pid"], threading.Event()

        def hold_up() -> None:
            while not done.wait(0.05):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.1)
                os.kill(pid, signal.SIGCONT)

        thread = threading.Thread(target=hold_up)
        thread.start()
        try:
            assert list(ranks(many_sums)) == [1200.0, 1200.0]
        finally:
            done.set()
            thread.join()


@pytest.mark.twenty
def test_row_13_a_rank_too_slow_for_the_timeout_is_named(tmp_path: Path) -> None:
    with nothing_left(tmp_path):
        assert "rank 1" in str(blamed(drags, timeout=1.5))


@pytest.mark.twenty
@pytest.mark.parametrize("start", ["forkserver", "spawn"])
def test_row_14_ranks_outlive_the_thread_that_started_them(tmp_path: Path, start: str) -> None:
    """PR_SET_PDEATHSIG, as torch sets it, belongs to a thread: its end would end the ranks."""
    with nothing_left(tmp_path):
        ranks = Ranks(2, start=start, echo=False)
        thread = threading.Thread(target=ranks.__enter__)
        thread.start()
        thread.join()
        time.sleep(0.3)
        assert list(ranks(total)) == [6.0, 6.0]
        ranks.close()


ENDINGS = [("forkserver", how) for how in ("returns", "raises", "dies")] + [("spawn", "dies")]


@pytest.mark.twenty
@pytest.mark.parametrize(("start", "how"), ENDINGS)
def test_what_a_rank_started_in_another_session_ends_with_it(
    tmp_path: Path, start: str, how: str
) -> None:
    marks = Path(tempfile.mkdtemp(dir=tmp_path))
    with nothing_left(tmp_path):
        if how == "returns":
            launch(leaves_a_daemon, str(marks), how, nprocs=2, start=start, echo=False)
        else:
            error = blamed(leaves_a_daemon, str(marks), how, start=start)
            assert ("status 1" if how == "dies" else "planted") in str(error)
        daemons = [int(mark.name.removeprefix("daemon-")) for mark in marks.glob("daemon-*")]
        assert len(daemons) == 2
        assert [pid for pid in daemons if psutil.pid_exists(pid)] == []  # nor a zombie


@pytest.mark.twenty
def test_what_ranks_started_ends_with_a_fork_server_that_is_killed(tmp_path: Path) -> None:
    """While nobody asks anything of the ranks, too."""
    marks = Path(tempfile.mkdtemp(dir=tmp_path))
    with Ranks(2, echo=False) as ranks:
        ranks(start_daemon, str(marks))
        ranks(start_daemon, str(marks), program=True)
        pids = [int(mark.name.removeprefix("daemon-")) for mark in marks.glob("daemon-*")]
        daemons = [psutil.Process(pid) for pid in pids]
        assert len(daemons) == 4
        servers.fork_server().process.kill()
        assert gone_within(daemons, WITHIN_S) == []


MAKERS = [("forkserver", "returns"), ("forkserver", "raises"), ("spawn", "dies")]


@pytest.mark.twenty
@pytest.mark.parametrize(("start", "how"), MAKERS)
def test_shared_memory_that_a_rank_made_ends_with_it(start: str, how: str) -> None:
    """The folder of torch's own manager of shared memory stays, with a socket in it, whose path may
    have 107 characters: so in a folder with a short name."""
    before = set(os.listdir("/dev/shm"))
    with tempfile.TemporaryDirectory() as short, nothing_left(Path(short)) as temporary:
        if how == "returns":
            there = launch(leaves_memory, how, nprocs=2, start=start, echo=False)[1]
            kinds = {name.replace(".", "_").split("_")[0] for name in set(there) - before}
            assert kinds >= {"psm", "sem", "torch"}
        else:
            blamed(leaves_memory, how, start=start)
        for torchs in temporary.glob("torch-shm-dir-*"):
            shutil.rmtree(torchs)


BLOCKED = """
import sys, time, torch, torch.distributed as dist
from torch.utils.data import DataLoader
from pardemo import launch
class Slow(torch.utils.data.Dataset):
    def __len__(self): return 1000
    def __getitem__(self, i):
        time.sleep(0.05)
        return torch.ones(2)
def block():
    batches = iter(DataLoader(Slow(), num_workers=1 - dist.get_rank()))
    next(batches)
    print("blocked", flush=True)
    dist.recv(torch.ones(1), 1 - dist.get_rank())
for _ in range(int(sys.argv[1])):
    try: launch(block, nprocs=2)
    except KeyboardInterrupt: print("interrupted", flush=True)
print(list(launch(dist.get_rank, nprocs=2)))
"""


@pytest.mark.parametrize("times", MANY)
@pytest.mark.parametrize("group", [False, True], ids=["alone", "with its group"])
def test_row_6_an_interrupt_of_the_parent(tmp_path: Path, group: bool, times: int) -> None:
    with nothing_left(tmp_path):
        program = Program(tmp_path, BLOCKED, str(times))
        for i in range(times):
            program.wait_for("blocked", times=2 * (i + 1))
            program.send(signal.SIGINT, group=group)
            program.wait_for("interrupted", seconds=WITHIN_S, times=i + 1)
        assert program.end() == 0
        assert program.out.endswith("[0, 1]\n")


@pytest.mark.twenty(3)
def test_row_6_an_interrupt_while_spawned_ranks_import_is_for_the_parent(
    tmp_path: Path, turn: int
) -> None:
    """Seen to fail where they hear it too: each printed where its import of torch was."""
    with nothing_left(tmp_path):
        program = Program(tmp_path, SPAWNS)
        program.wait_below("spawn_main")
        time.sleep(0.05 * turn)
        program.send(signal.SIGINT, group=True)
        assert program.end() == -signal.SIGINT
        assert program.err.count("Traceback") == 1, program.err
        assert program.err.endswith("KeyboardInterrupt\n"), program.err


def end_parents(tmp_path: Path, signum: int, ignored: bool, times: int) -> None:
    """Three at a time: start programs whose ranks are blocked, signal them, nobody is left."""
    for first in range(0, times, 3):
        here = [
            Program(tmp_path, BLOCKED, "1", sigint_ignored=ignored)
            for _ in range(min(3, times - first))
        ]
        for program in here:
            program.wait_for("blocked", times=2)
        for program in here:
            if ignored:  # as it asked to: this must not end it
                program.send(signal.SIGINT, group=True)
            family = program.family()
            assert len(alive(family)) == 5  # it, its fork server, two ranks, a loader's worker
            program.send(signum)
            assert program.end(WITHIN_S) == -signum  # a shell shows 128 + signum
            assert gone_within(family, 2.0) == []


@pytest.mark.parametrize("times", MANY)
def test_row_7_the_parent_is_told_to_end(tmp_path: Path, times: int) -> None:
    with nothing_left(tmp_path):
        end_parents(tmp_path, signal.SIGTERM, ignored=False, times=times)


@pytest.mark.parametrize("times", MANY)
@pytest.mark.parametrize("ignored", [False, True], ids=["", "interrupts ignored"])
def test_row_8_the_parent_is_killed(tmp_path: Path, ignored: bool, times: int) -> None:
    with nothing_left(tmp_path):
        end_parents(tmp_path, signal.SIGKILL, ignored=ignored, times=times)


LAN = "192.0.2.2"
BREAKS = {  # whether the ranks are told which interface is theirs: what listens then
    "as it is": ("", "['127.0.0.1']"),
    "broken on purpose": ('del found["GLOO_SOCKET_IFNAME"]', f"['127.0.0.1', '{LAN}']"),
}


@pytest.mark.twenty
@NEEDS_UNSHARE
@pytest.mark.skipif(shutil.which("ip") is None, reason="needs ip (iproute2)")
@pytest.mark.parametrize("breaks", BREAKS)
def test_row_15_nothing_listens_beyond_loopback_where_the_host_has_a_lan(
    tmp_path: Path, breaks: str
) -> None:
    """The host's name is that of its LAN address, which gloo takes by itself: seen where the ranks
    are not told to use loopback, so that the watcher is known to find it."""
    breaking, listening = BREAKS[breaks]
    (tmp_path / "hosts").write_text(f"127.0.0.1 localhost\n{LAN} on-a-lan\n")
    script = """
    import socket, sys, threading, psutil, torch, torch.distributed as dist
    from pardemo import launch
    from pardemo.launch import rendezvous
    as_it_is = rendezvous.environment
    def environment(*args):
        found = as_it_is(*args)
        exec(sys.argv[1])
        return found
    rendezvous.environment = environment
    seen, ended = set(), threading.Event()
    def watch():
        here = psutil.Process()
        while not ended.is_set():
            for process in [here, *here.children(recursive=True)]:
                try: seen.update(c.laddr.ip for c in process.net_connections("inet")
                                 if c.status == psutil.CONN_LISTEN)
                except psutil.Error: pass
    def work():
        for _ in range(200):
            dist.all_reduce(torch.ones(10))
    threading.Thread(target=watch).start()
    try:
        for start in ("forkserver", "spawn"):
            launch(work, nprocs=2, start=start)
    finally:
        ended.set()
    print(socket.gethostbyname(socket.gethostname()), sorted(seen))
    """
    inside = " && ".join(
        [
            "ip link set lo up",
            f"ip address add {LAN}/24 dev lo",
            "hostname on-a-lan",
            f"mount --bind {tmp_path / 'hosts'} /etc/hosts",
        ]
    )
    with nothing_left(tmp_path):
        command = in_namespace(inside, "--mount", "--net", "--uts")
        program = Program(tmp_path, script, breaking, command=command)
        assert program.end(250) == 0, program.err
        assert program.out == f"{LAN} {listening}\n"


@pytest.mark.twenty
@NEEDS_UNSHARE
def test_row_15_loopback_that_is_down_is_said_at_once(tmp_path: Path) -> None:
    script = """
    import torch.distributed as dist
    from pardemo import launch
    for start in ("forkserver", "spawn"):
        try:
            launch(dist.get_rank, nprocs=2, start=start)
        except RuntimeError as error:
            print(error)
    """
    with nothing_left(tmp_path):
        program = Program(tmp_path, script, command=["unshare", "--net", sys.executable])
        assert program.end(60) == 0, program.err
        said = program.out.splitlines()
        assert len(said) == 2
        assert all("loopback interface is down" in line for line in said)
        assert all("`ip link set lo up`" in line for line in said)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("start", ["forkserver", "spawn"])
def test_row_40_a_hundred_launches_do_not_grow(tmp_path: Path, start: str) -> None:
    with nothing_left(tmp_path):
        for _ in range(25 if start == "forkserver" else 5):
            launch(values, nprocs=2, start=start, echo=False)
        here, threads = psutil.Process(), threading.active_count()
        before = here.memory_info().rss
        for _ in range(100):
            launch(values, nprocs=2, start=start, echo=False)
        assert threading.active_count() == threads
        assert here.memory_info().rss < 1.05 * before
