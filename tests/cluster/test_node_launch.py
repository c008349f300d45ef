"""Ranks on different nodes talk over the link, and everything the launcher promises holds there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pardemo.cluster import Nodes
from pardemo.launch import RankFailed, RankTimeout
from pardemo.parameters import Refused

ELEMENTS = 1 << 20


def where() -> tuple[str, str, str]:
    return socket.gethostname(), os.environ["LOCAL_RANK"], os.environ["GROUP_RANK"]


def total(elements: int) -> float:
    tensor = torch.full((elements,), float(dist.get_rank() + 1))
    dist.all_reduce(tensor)  # moves 2(n-1)/n * bytes of tensor
    return float(tensor.sum())


def test_ranks_live_on_the_nodes_in_order(lab: Nodes) -> None:
    results = lab.launch(where, nprocs_per_node=2, timeout=120)
    assert list(results) == [
        ("node0", "0", "0"), ("node0", "1", "0"), ("node1", "0", "1"), ("node1", "1", "1")
    ]  # fmt: skip


def test_the_cable_carries_what_the_formula_says(lab: Nodes) -> None:
    with lab.ranks(timeout=120) as ranks:
        ranks(total, 1)
        before = lab.tx_bytes()
        results = ranks(total, ELEMENTS)
        sent = [after - start for start, after in zip(before, lab.tx_bytes(), strict=True)]
    assert list(results) == [3.0 * ELEMENTS] * 2
    payload = 2 * (2 - 1) / 2 * 4 * ELEMENTS
    for one in sent:  # headers: 66 bytes for at least every 64 kB and at most every 1,448 bytes
        assert payload < one < payload * 1.12


def load_with_a_worker() -> str:
    manager = multiprocessing.get_context("fork").Manager()  # has a socket in a temporary folder
    return str(manager.address)


def test_ranks_on_nodes_leave_no_temporary_file(
    lab: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    addresses = lab.launch(load_with_a_worker, timeout=120)
    assert [address.startswith(f"{tmp_path}/pr-") for address in addresses] == [True, True]
    assert list(tmp_path.iterdir()) == []


def raise_on_one() -> None:
    if dist.get_rank() == 1:
        raise KeyError("lost key")
    dist.barrier()


def die_on_one() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


@pytest.mark.parametrize(("fn", "words"), [(raise_on_one, "lost key"), (die_on_one, "SIGKILL")])
def test_the_rank_at_fault_is_named_across_nodes(lab: Nodes, fn: Any, words: str) -> None:
    with pytest.raises(RankFailed, match=words) as caught:
        lab.launch(fn, timeout=120)
    assert caught.value.rank == 1


def test_a_pulled_cable_ends_at_the_timeout(lab: Nodes) -> None:
    with lab.ranks(timeout=120) as ranks:
        ranks(total, 1)
    with lab.ranks(timeout=6) as ranks:
        lab.plug(1, False)
        with pytest.raises(RankTimeout):
            ranks(total, ELEMENTS)
    lab.plug(1, True)
    assert lab.run(0, ["true"]).returncode == 0


def test_after_all_this_the_nodes_still_train(lab: Nodes) -> None:
    assert list(lab.launch(total, 8, timeout=120)) == [24.0, 24.0]


def test_no_rank_is_refused(lab: Nodes) -> None:
    with pytest.raises(Refused, match="at least 1"):
        lab.launch(where, nprocs_per_node=0)
