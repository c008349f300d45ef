"""Temporary folders: gone after their block, swept when their owner was killed, never while he
lives, and nothing else is touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pardemo import scratch
from pardemo.launch import leftovers

OWNER = """
import sys, time
from pardemo import scratch
with scratch.folder() as folder:
    (folder / "file").write_text("x")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_a_folder_is_private_and_gone_after_its_block(place: Path) -> None:
    with scratch.folder() as made:
        (made / "inside").write_text("x")
        assert made.stat().st_mode & 0o077 == 0
        assert list(place.iterdir()) == [made]
    with pytest.raises(ZeroDivisionError), scratch.folder():
        1 / 0  # noqa: B018
    assert list(place.iterdir()) == []


def test_what_a_killed_owner_has_left_is_swept_and_what_a_living_one_has_is_not(
    place: Path,
) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True) as one:
        assert one.stdout is not None
        folder = Path(one.stdout.readline().strip())
        assert scratch.sweep() == []
        assert (folder / "file").exists(), "its owner lives"
        one.send_signal(signal.SIGKILL)
    assert folder.exists(), "who is killed removes nothing"
    with scratch.folder() as made:
        assert list(place.iterdir()) == [made]


def test_nothing_else_is_swept(place: Path) -> None:
    target = place / "target"
    target.mkdir()
    (target / "file").write_text("x")
    (place / "pardemo-tmp-abcdefgh").symlink_to(target)
    (place / "pardemo-tmp-12345678").write_text("a file")
    (place / "pardemo-tmp-mine").mkdir()
    (place / "pardemo-0").mkdir()
    before = sorted(place.rglob("*"))
    assert scratch.sweep() == []
    assert sorted(place.rglob("*")) == before
    (place / "pardemo-tmp-deadbeef").mkdir()
    if os.geteuid() == 0:  # another user's stays
        os.chown(place / "pardemo-tmp-deadbeef", 65534, 65534)
        assert scratch.sweep() == []
        os.chown(place / "pardemo-tmp-deadbeef", 0, 0)
    assert scratch.sweep() == [place / "pardemo-tmp-deadbeef"]


@pytest.mark.parametrize("name", ["", ".", "sub", "pr-abc", "pardemo-0"])
def test_only_folders_of_its_own_making_are_removed(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """An empty path is the folder that one is in."""
    monkeypatch.chdir(place)
    (place / "sub").mkdir()
    for path in (Path(name), place / name):
        with pytest.raises(ValueError, match="is no folder of"):
            scratch.remove(path)
    leftovers.clear("")
    assert (place / "sub").exists()
