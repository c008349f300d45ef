"""Timings of these tests hold a clock of their own, so that they need not wait for a benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from pardemo.records import lock


@pytest.fixture(autouse=True)
def own_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock file of this test alone."""
    monkeypatch.setattr(lock, "lock_path", lambda: tmp_path / "locks" / "timing.lock")
