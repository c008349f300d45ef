"""The fault matrix of checkpoints, at random moments and places: what was saved is never lost.

Numbers in names are rows of the matrix. Kills in each named phase of a save, each kind of damage,
and hostile contents are in tests/cluster/test_checkpoint.py.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pardemo.cluster.checkpoint import Checkpoints, Loaded
from pardemo.launch import RankFailed, launch
from tests.faults.harness import ROOT

WIDTH = 400  # 1.3 MB per save: long enough to be killed in
SEEDS = [*range(3), *(pytest.param(n, marks=pytest.mark.soak) for n in range(3, 23))]


def state_of(step: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and an optimiser whose numbers say after which step they were saved."""
    model = torch.nn.Linear(WIDTH, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.data.fill_(step)
        optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, step + 0.5)
    return model, optimizer


def held(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> set[float]:
    """The distinct numbers in both: one of each when nothing is mixed."""
    tensors = [p.detach() for p in model.parameters()]
    tensors += [one["momentum_buffer"] for one in optimizer.state.values()]
    return {float(value) for tensor in tensors for value in tensor.unique()}


def load(folder: Path) -> Loaded:
    """The newest good checkpoint, whose numbers are all of the step that it says."""
    model, optimizer = state_of(-1)
    found = Checkpoints(folder).load(model, optimizer)
    assert found is not None
    assert held(model, optimizer) == {found.step, found.step + 0.5}
    return found


def save_for_ever(folder: str, how: str, victim: int, after_s: float) -> None:
    """Save step after step; rank `victim` is killed `after_s` after the first was acknowledged."""
    checkpoints = Checkpoints(folder)
    checkpoints.save(0, *state_of(0))

    def kill() -> None:
        time.sleep(after_s)
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == victim:
        threading.Thread(target=kill, daemon=True).start()
    for step in range(1, 10_000):
        model, optimizer = state_of(step)
        getattr(checkpoints, how)(step, model, optimizer)
        model.weight.data.fill_(-7)  # training goes on while an asynchronous save is written
        checkpoints.wait()
        if dist.get_rank() == 0:
            # appended: a file that is written anew may be found empty
            with open(Path(folder, "acknowledged"), "a") as told:
                told.write(f"{step}\n")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", ["save", "save_async"])
@pytest.mark.parametrize("seed", SEEDS)
def test_27_a_writer_killed_at_a_random_moment_loses_nothing_acknowledged(
    tmp_path: Path, seed: int, how: str
) -> None:
    chance, folder = random.Random(f"{seed}{how}"), tmp_path / "run"
    with pytest.raises(RankFailed, match="SIGKILL"):
        launch(
            save_for_ever, str(folder), how, chance.randrange(2), chance.uniform(0, 0.5),
            nprocs=2, timeout=60,
        )  # fmt: skip
    told = folder / "acknowledged"
    acknowledged = [0, *map(int, told.read_text().split())][-1] if told.exists() else 0
    found = load(folder)
    assert found.rejected == ()
    assert acknowledged <= found.step <= acknowledged + 1
    Checkpoints(folder).save(found.step + 1, *state_of(found.step + 1))
    assert load(folder).step == found.step + 1
    assert list(folder.glob("*.tmp-*")) == []


FULL = """
import random
import sys
from pathlib import Path
from pardemo.cluster import storing
from pardemo.cluster.checkpoint import Checkpoints
from tests.faults.test_checkpoint_rows import load, state_of
storing.SPARE = 0.0  # nothing is foreseen: the disk fills in the middle of the save
root, chance, step, full = Path(sys.argv[1]), random.Random(26), 1, 0
folder, filler = root / "run", root / "filler"
Checkpoints(folder).save(step, *state_of(step))
for _ in range(20):
    free = storing.shutil.disk_usage(root).free
    filler.write_bytes(bytes(free - chance.randrange(0, 1_500_000)))
    again = chance.random() < 0.5  # the same step again, or the next one
    wanted = step if again else step + 1
    try:
        Checkpoints(folder).save(wanted, *state_of(wanted))
        step = wanted
    except storing.DiskFull as error:
        assert f"disk full at {folder}" in str(error), error
        full += 1
    assert load(folder).step == step
    assert load(folder).rejected == ()
    assert list(folder.glob("*.tmp-*")) == []
    filler.unlink()
    step += 1
    Checkpoints(folder).save(step, *state_of(step))  # and with room it works again
    assert load(folder).step == step
print("full", full)
"""


@pytest.mark.timeout(150)
def test_26_a_disk_that_fills_at_a_random_byte_loses_nothing(tmp_path: Path) -> None:
    mounted = 'mount -t tmpfs -o size=8m tmpfs "$0" && exec "$1" -c "$CODE" "$0"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounted]
    command += [str(tmp_path), sys.executable]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "CODE": FULL}, text=True, capture_output=True,
        timeout=120,
    )  # fmt: skip
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no private file system here, no disk to fill: {done.stderr[:200]}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert 5 <= int(done.stdout.split()[-1]) <= 20, done.stdout


def damage(chance: random.Random, folder: Path) -> Path:
    """Flip one bit of one file of a checkpoint, or cut one short, anywhere; the file."""
    file = chance.choice(sorted(folder.iterdir()))
    size = file.stat().st_size
    if chance.random() < 0.5:
        os.truncate(file, chance.randrange(size))
        return file
    data, place = bytearray(file.read_bytes()), chance.randrange(size)
    data[place] ^= 1 << chance.randrange(8)
    file.write_bytes(data)
    return file


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "MANIFEST.json", "any"])
def test_28_damage_at_a_random_place_is_found_and_named(tmp_path: Path, name: str) -> None:
    original, chance = tmp_path / "original", random.Random(f"28{name}")
    for step in (1, 2):
        Checkpoints(original).save(step, *state_of(step))
    for number in range(20):
        folder = tmp_path / f"copy{number}"
        shutil.copytree(original, folder)
        newest = folder / "step-00000002"
        while (file := damage(chance, newest)).name != name and name != "any":
            shutil.rmtree(newest)
            shutil.copytree(original / newest.name, newest)
        with pytest.warns(UserWarning, match="checkpoint refused"):
            found = load(folder)
        assert found.step == 1, file
        assert "step-00000002" in found.rejected[0]
        shutil.rmtree(folder)
