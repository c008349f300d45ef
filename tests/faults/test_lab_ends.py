"""`pardemo lab` ended at a random moment of a cell that launches ranks: server, kernel, fork
server, ranks, and what these started in sessions of their own, all go."""

from __future__ import annotations

import json
import random
import re
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from jupyter_client import BlockingKernelClient
from jupyter_core.utils import ensure_event_loop

from .harness import Program, gone_within, nothing_left
from .test_random_moments import SUBJECTS, clear_away

ENDS = {signal.SIGTERM: 143, signal.SIGINT: 0, signal.SIGHUP: 129, signal.SIGKILL: -9}
GONE_S = 10.0  # a kernel looks for its server from time to time
CELL = """
import subprocess, torch.distributed as dist
from pardemo import Ranks, launch
def starts():
    subprocess.Popen(["sleep", "900"], start_new_session=True)
ranks = Ranks(2).__enter__()
ranks(starts)
print("they run", flush=True)
while True:
    launch(dist.get_rank, nprocs=2)
"""


def a_kernel(lab: Program, runtime: Path) -> BlockingKernelClient:
    """A kernel of that lab, asked for as a browser does, with the token that it printed, whole."""
    until = time.monotonic() + 120
    while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/\S*token=(\w{48})", lab.err)):
        assert lab.process.poll() is None, lab.err
        assert time.monotonic() < until, lab.err
        time.sleep(0.1)
    port, token = found.groups()
    address = f"http://127.0.0.1:{port}/api/kernels?token={token}"
    asked = urllib.request.Request(address, method="POST", data=b'{"name": "python3"}')
    while True:
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                number = json.load(answer)["id"]
                break
        except urllib.error.URLError:  # it prints its address just before it listens
            assert time.monotonic() < until, lab.err
            time.sleep(0.1)
    client = BlockingKernelClient(connection_file=str(runtime / f"kernel-{number}.json"))
    client.load_connection_file()
    client.start_channels()
    while True:
        try:
            client.wait_for_ready(timeout=120)
            return client
        except RuntimeError:  # no heartbeat yet: it imports
            assert time.monotonic() < until, lab.err
            time.sleep(0.5)


def wait_until_ranks_run(client: BlockingKernelClient) -> None:
    client.execute(CELL)
    while True:
        message = client.get_iopub_msg(timeout=120)
        assert message["msg_type"] != "error", message["content"]
        if "they run" in message["content"].get("text", ""):
            return


@pytest.mark.twenty
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM, signal.SIGKILL,
        *(pytest.param(n, marks=pytest.mark.soak) for n in (signal.SIGINT, signal.SIGHUP)),
    ],
)  # fmt: skip
def test_a_lab_that_is_ended_takes_everything_with_it(
    tmp_path: Path, number: signal.Signals, turn: int
) -> None:
    chance, runtime = random.Random(f"{number} {turn}"), tmp_path / "r"
    runtime.mkdir()
    ensure_event_loop()  # Jupyter's client makes one, which stays: three descriptors
    with nothing_left(tmp_path, within_s=GONE_S) as temporary:
        words = SUBJECTS["lab"].words
        lab = Program(temporary, None, command=words, JUPYTER_RUNTIME_DIR=str(runtime))
        client = a_kernel(lab, runtime)
        wait_until_ranks_run(client)
        time.sleep(chance.uniform(0.0, 1.0))
        family = lab.family()
        assert len(family) >= 7  # it, server, kernel, fork server, two ranks, sleepers
        lab.send(number)
        assert lab.end(60) == ENDS[number], lab.err
        assert gone_within(family, GONE_S) == []
        client.stop_channels()
        clear_away(temporary, lab, number, SUBJECTS["lab"])
