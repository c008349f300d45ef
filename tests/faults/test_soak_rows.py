"""Soak: the whole strategies benchmark over and over in one process; nothing grows beyond 5 %.

`PARDEMO_SOAK_S=300 pytest tests/faults/test_soak_rows.py -m soak` for another duration than 1800 s.
"""

from __future__ import annotations

import gc
import os
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from pardemo import records, suite
from pardemo.records import lock

DURATION_S = float(os.environ.get("PARDEMO_SOAK_S", "1800"))
MOST_GROWTH = 1.05
FIRST = 3  # runs until caches, pools and the fork server have their size


def held(folder: Path) -> dict[str, float]:
    """What this process and all below it hold now."""
    gc.collect()
    here = psutil.Process()
    family = [here, *here.children(recursive=True)]
    return {
        "processes": len(family),
        "descriptors": sum(process.num_fds() for process in family),
        "threads": threading.active_count() + here.num_threads(),
        "shared memory": len([x for x in os.listdir("/dev/shm") if str(os.getpid()) in x]),
        "temporary files": len(list(folder.rglob("*"))),
        "memory": sum(process.memory_info().rss for process in family),
    }


def grown(early: dict[str, float], late: dict[str, float]) -> dict[str, tuple[float, float]]:
    """What is larger by more than 5 % than it was."""
    return {
        name: (early[name], now)
        for name, now in late.items()
        if now > MOST_GROWTH * early[name] + 1e-9
    }


def test_growth_is_found() -> None:
    """Broken on purpose: one descriptor more of twenty is within 5 %, two are not."""
    assert grown({"descriptors": 20}, {"descriptors": 21}) == {}
    assert grown({"descriptors": 20}, {"descriptors": 22}) == {"descriptors": (20, 22)}
    assert grown({"shared memory": 0}, {"shared memory": 1}) == {"shared memory": (0, 1)}


@pytest.mark.soak
@pytest.mark.timeout(DURATION_S + 900)
def test_the_strategies_benchmark_grows_in_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(lock, "lock_path", lambda: tmp_path / "own" / "timing.lock")
    results = tmp_path / "results" / "pardemo.sqlite"
    until, seen = time.monotonic() + DURATION_S, []
    while time.monotonic() < until or len(seen) < FIRST + 2:
        table = suite.run(
            "gpt-mini", nprocs=2, rounds=4, seconds=6, limit_s=180, record=results
        )  # every strategy, with its anatomy: what `pardemo bench strategies` runs
        assert len(table.rows) > 0
        del table
        seen.append(held(temporary))
        print(len(seen), seen[-1], flush=True)
    assert grown(seen[FIRST - 1], seen[-1]) == {}
    store = records.open(results)
    assert len(store.runs()) == len(seen), "one run recorded each time"
