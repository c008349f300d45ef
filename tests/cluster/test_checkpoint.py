"""A checkpoint is written whole or not at all, verified before it is opened, and fits any world."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from pardemo import strategies, workloads
from pardemo.cluster import storing
from pardemo.cluster.checkpoint import CheckpointError, Checkpoints
from pardemo.cluster.integrity import Damaged, _Unpickler, digest, seal
from pardemo.cluster.order import DataOrder
from pardemo.launch import RankFailed, Ranks, launch

ROOT = Path(__file__).parents[2]
STEPS, SAVED = 6, 3


def losses(folder: str, name: str, until: int, save: str = "") -> list[float]:
    """Train `name` from its newest checkpoint to step `until`, saving after step SAVED."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    work, row = workloads.workload("mlp"), strategies.get(name)
    step = row.build(work.make_model(rank), workloads.adamw, work.loss, row.mesh())
    checkpoints = Checkpoints(folder)
    found = checkpoints.load(step.model, step.optimizer)
    order = DataOrder(512, 64, seed=3)
    if found:
        order.load(found.extra["order"])
    inputs, targets = work.make_batch(512, 0, 0)
    seen = []
    for number in range(found.step if found else 0, until):
        chosen = next(order)
        seen.append(float(step.step((inputs[chosen], targets[chosen]))))
        if number + 1 == SAVED and save:
            extra = {"order": order.state()}
            getattr(checkpoints, save)(SAVED, step.model, step.optimizer, extra)
    checkpoints.wait()
    return seen


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(str(tmp_path_factory.mktemp("none")), "single", STEPS)


@pytest.mark.parametrize(
    ("saved", "saved_on", "resumed", "resumed_on", "how"),
    [
        ("ddp", 2, "ddp", 2, "save"), ("fsdp", 4, "fsdp", 2, "save_async"),
        ("fsdp", 4, "ddp", 2, "save"), ("ddp", 2, "fsdp", 4, "save_async"),
        ("fsdp", 2, "single", 1, "save"),
    ],
)  # fmt: skip
def test_resuming_elsewhere_continues_the_same_loss_curve(
    tmp_path: Path, undisturbed: list[float], ranks2: Ranks, ranks4: Ranks,
    saved: str, saved_on: int, resumed: str, resumed_on: int, how: str,
) -> None:  # fmt: skip
    on: dict[int, Callable[..., Any]] = {1: lambda fn, *args: [fn(*args)], 2: ranks2, 4: ranks4}
    first = on[saved_on](losses, str(tmp_path), saved, SAVED, how)[0]
    second = on[resumed_on](losses, str(tmp_path), resumed, STEPS)[0]
    assert (len(first), len(second)) == (SAVED, STEPS - SAVED)
    assert first + second == pytest.approx(undisturbed, abs=2e-6)


def small(seed: int = 0, width: int = 8) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture
def two_saved(tmp_path: Path) -> tuple[Path, dict[int, torch.Tensor]]:
    """Checkpoints of steps 10 and 20 with known weights."""
    known = {}
    for step in (10, 20):
        model, optimizer = small(seed=step)
        Checkpoints(tmp_path / "run").save(step, model, optimizer, {"note": step})
        known[step] = weights(model)
    return tmp_path / "run", known


def truncate(folder: Path) -> str:
    os.truncate(folder / "__0_0.distcp", 100)
    return "__0_0.distcp has 100 bytes instead of"


def flip(folder: Path) -> str:
    data = bytearray((folder / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "__0_0.distcp").write_bytes(data)
    return "__0_0.distcp has other contents"


def lose(folder: Path) -> str:
    (folder / ".metadata").unlink()
    return ".metadata is missing"


def add(folder: Path) -> str:
    (folder / "extra.pt").write_bytes(b"x")
    return "extra.pt is not in the manifest"


def unfinished(folder: Path) -> str:
    (folder / "MANIFEST.json").unlink()
    return "MANIFEST.json is missing"


def garbled(folder: Path) -> str:
    (folder / "MANIFEST.json").write_text("{")
    return "is not a manifest"


def open_to_all(folder: Path) -> str:
    (folder / "__0_0.distcp").chmod(0o666)
    return "writable by others (mode 666)"


def linked(folder: Path) -> str:
    shutil.move(folder / ".metadata", folder.parent / "elsewhere")
    (folder / ".metadata").symlink_to(folder.parent / "elsewhere")
    return "is a symbolic link"


DAMAGES = [truncate, flip, lose, add, unfinished, garbled, open_to_all, linked]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    two_saved: tuple[Path, dict[int, torch.Tensor]], damage: Callable[[Path], str]
) -> None:
    folder, known = two_saved
    said = damage(folder / "step-00000020")
    model, optimizer = small(seed=99)
    with pytest.warns(UserWarning, match="checkpoint refused"):
        found = Checkpoints(folder).load(model, optimizer)
    assert found is not None
    assert (found.step, found.extra) == (10, {"note": 10})
    assert said in found.rejected[0]
    assert "step-00000020" in found.rejected[0]
    assert torch.equal(weights(model), known[10])


def test_when_none_is_good_training_does_not_silently_start_afresh(
    two_saved: tuple[Path, dict[int, torch.Tensor]],
) -> None:
    folder, _ = two_saved
    for name in ("step-00000010", "step-00000020"):
        flip(folder / name)
    with (
        pytest.warns(UserWarning, match="refused"),
        pytest.raises(CheckpointError, match=r"no checkpoint in .* is good: .*20.*10"),
    ):
        Checkpoints(folder).load(*small())


def test_the_word_latest_may_be_stale(two_saved: tuple[Path, dict[int, torch.Tensor]]) -> None:
    folder, known = two_saved
    assert (folder / "latest").read_text() == "step-00000020\n"
    (folder / "latest").write_text("step-00000010\n")
    model, optimizer = small(seed=99)
    found = Checkpoints(folder).load(model, optimizer)
    assert found is not None
    assert repr(found) == "checkpoint of step 20 from step-00000020"
    assert torch.equal(weights(model), known[20])


def test_an_empty_folder_is_a_fresh_start(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none").load(*small()) is None
    assert not (tmp_path / "none").exists()


class Hostile:
    """Unpickled, it creates a file: what a planted pickle would do, made visible."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def forge_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    manifest["files"] = {name: digest(folder / name) for name in manifest["files"]}
    del manifest["sha256"]
    (folder / "MANIFEST.json").write_text(seal(manifest))


def test_a_planted_pickle_is_refused_and_never_runs_even_with_a_forged_manifest(
    two_saved: tuple[Path, dict[int, torch.Tensor]], tmp_path: Path
) -> None:
    folder, _ = two_saved
    bad = folder / "step-00000020"
    (bad / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    forge_manifest(bad)
    model, optimizer = small(seed=99)
    with pytest.warns(UserWarning, match="mkdir, which no checkpoint needs"):
        found = Checkpoints(folder).load(model, optimizer)
    assert found is not None
    assert found.step == 10
    assert not (tmp_path / "ran").exists()
    with pytest.raises(CheckpointException):  # the plant works: torch itself runs it
        dcp.load({"x": torch.zeros(1)}, checkpoint_id=bad, no_dist=True)
    assert (tmp_path / "ran").exists()


class ByName:
    """Pickled as Python before 3.11.4 pickles a member of an Enum, or anything an attribute."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)


def test_enum_members_of_older_pythons_are_read_and_other_attributes_refused() -> None:
    member = _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT
    written = pickle.dumps(ByName(_MEM_FORMAT_ENCODING, member.name))
    assert _Unpickler(io.BytesIO(written)).load() is member
    for owner, name in ((PosixPath, "unlink"), (_MEM_FORMAT_ENCODING, "__class__")):
        planted = pickle.dumps(ByName(owner, name))
        with pytest.raises(Damaged, match=f"takes '{name}' of .*which no checkpoint needs"):
            _Unpickler(io.BytesIO(planted)).load()


def test_pickled_objects_among_the_data_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    model, optimizer = small()
    Checkpoints(folder).save(1, model, optimizer)
    bad = folder / "step-00000001"
    for name in ("__0_0.distcp", ".metadata"):
        (bad / name).unlink()
    state = {"model/0.weight": Hostile(tmp_path / "ran")}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(bad), no_dist=True)
    for name in ("__0_0.distcp", ".metadata"):
        (bad / name).chmod(0o600)
    forge_manifest(bad)
    with (
        pytest.warns(UserWarning, match="refused"),
        pytest.raises(CheckpointError, match="is good"),
    ):
        Checkpoints(folder).load(model, optimizer)
    assert not (tmp_path / "ran").exists()


def test_what_does_not_fit_the_model_is_named(tmp_path: Path) -> None:
    Checkpoints(tmp_path / "run").save(1, *small())
    with pytest.raises(
        CheckpointError, match=r"model/0\.weight is \(8, 4\) there and \(9, 4\) here"
    ):
        Checkpoints(tmp_path / "run").load(*small(width=9))
    wider = torch.nn.Sequential(*small()[0], torch.nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(wider.parameters())
    with pytest.raises(CheckpointError, match=r"it has no model/2\.bias, model/2\.weight"):
        Checkpoints(tmp_path / "run").load(wider, optimizer)


def test_only_plain_values_are_saved_beside_tensors(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="set is not JSON"):
        Checkpoints(tmp_path / "run").save(1, *small(), extra={"bad": {1, 2}})
    with pytest.raises(CheckpointError, match="NoneType"):
        Checkpoints(tmp_path / "run").save(1, small()[0], None)


def test_the_newest_two_are_kept_private_and_nothing_else(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run", keep=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step-00000001.tmp-killed").mkdir()
    for step in (1, 2, 3, 3):
        checkpoints.save(step, *small())
    names = sorted(entry.name for entry in (tmp_path / "run").iterdir())
    assert names == ["latest", "step-00000002", "step-00000003"]
    for file in (tmp_path / "run" / "step-00000003").iterdir():
        assert file.stat().st_mode & 0o077 == 0


def test_an_asynchronous_save_has_the_weights_of_its_moment(tmp_path: Path) -> None:
    model, optimizer = small()
    then = weights(model).clone()
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save_async(5, model, optimizer, {"x": 1})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    checkpoints.wait()
    found = Checkpoints(tmp_path / "run").load(model, optimizer)
    assert found is not None
    assert (found.step, found.extra) == (5, {"x": 1})
    assert torch.equal(weights(model), then)


def save_and_die(folder: str, phase: str) -> None:
    def die_at(name: str) -> None:
        if name == phase:
            os.kill(os.getpid(), signal.SIGKILL)

    model, optimizer = small(seed=1)
    Checkpoints(folder).save(10, model, optimizer)
    Checkpoints(folder, notify=die_at).save(20, *small(seed=2))


@pytest.mark.parametrize(
    ("phase", "expected"),
    [("data", 10), ("manifest", 10), ("rename", 10), ("latest", 20), ("done", 20)],
)
def test_a_kill_at_any_moment_leaves_a_good_checkpoint(
    tmp_path: Path, phase: str, expected: int
) -> None:
    with pytest.raises(RankFailed, match="SIGKILL"):
        launch(save_and_die, str(tmp_path / "run"), phase, nprocs=2, timeout=60)
    model, optimizer = small(seed=99)
    found = Checkpoints(tmp_path / "run").load(model, optimizer)
    assert found is not None
    assert (found.step, found.rejected) == (expected, ())
    assert torch.equal(weights(model), weights(small(seed=expected // 10)[0]))
    Checkpoints(tmp_path / "run").save(30, model, optimizer)
    assert not list((tmp_path / "run").glob("*.tmp-*"))


def test_a_full_disk_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(1, *small())
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(storing.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        storing.DiskFull, match=r"disk full at .*run: .* needs .* MB and 0\.0 MB are"
    ):
        checkpoints.save(2, *small())
    found = checkpoints.load(*small())
    assert found is not None
    assert found.step == 1


FULL = """
import sys
from pathlib import Path
import torch
from pardemo.cluster import storing
from pardemo.cluster.checkpoint import Checkpoints
storing.SPARE = 0.0
model = torch.nn.Linear(500, 500)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
folder = Path(sys.argv[1]) / "run"
Checkpoints(folder).save(1, model, optimizer)
(folder.parent / "filler").write_bytes(bytes(1_500_000))
try:
    Checkpoints(folder).save(2, model, optimizer)
except storing.DiskFull as error:
    print(error)
print(Checkpoints(folder).load(model, optimizer), sorted(p.name for p in folder.iterdir()))
(folder.parent / "filler").unlink()
Checkpoints(folder).save(3, model, optimizer)
print(Checkpoints(folder).load(model, optimizer))
"""


def test_a_disk_that_fills_during_the_save_loses_nothing(tmp_path: Path) -> None:
    mounted = 'mount -t tmpfs -o size=5m tmpfs "$0" && exec "$1" -c "$CODE" "$0"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounted]
    command += [str(tmp_path), sys.executable]
    environment = {**os.environ, "CODE": FULL}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=90
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(
            f"no private file system here, so the disk cannot be filled: {done.stderr[:200]}"
        )
    assert "disk full at" in done.stdout, done.stderr
    assert "checkpoint of step 1 from step-00000001 ['latest', 'step-00000001']" in done.stdout
    assert "checkpoint of step 3" in done.stdout


def test_the_order_of_data_goes_on_where_it_was() -> None:
    straight, first, second = (DataOrder(10, 3, seed=5) for _ in range(3))
    expected = [next(straight).tolist() for _ in range(8)]
    begun = [next(first).tolist() for _ in range(4)]
    second.load(json.loads(json.dumps(first.state())))
    assert begun + [next(second).tolist() for _ in range(4)] == expected
    assert expected[:3] != expected[3:6]
    with pytest.raises(ValueError, match="seed 5, this one 6"):
        DataOrder(10, 3, seed=6).load(first.state())


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="1 to 10"):
        DataOrder(10, 11)
