"""The rank that was at fault is named, however it failed."""

from __future__ import annotations

import pytest
from launch_faults import FAULTS, Fault

from pardemo.launch import RankFailed, Ranks, RankTimeout, launch

SOAK_ROUNDS = 20


def waits_for_rank_0(fault: Fault, culprit: int) -> bool:
    """Nobody but rank 0 keeps the list of torch's barrier: where it is late, the others hang."""
    return culprit == 0 and fault.run.__name__ == "misses_the_barrier"


def blamed(fault: Fault, culprit: int, nprocs: int, **options: object) -> RankFailed:
    timeout = 2.0 if fault.hangs or waits_for_rank_0(fault, culprit) else 30.0
    with pytest.raises(RankFailed) as caught:
        launch(fault.run, culprit, nprocs=nprocs, timeout=timeout, **options)
    return caught.value


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_the_rank_at_fault_is_named_among_three(fault: Fault) -> None:
    error = blamed(fault, culprit=1, nprocs=3)
    assert (error.rank, fault.says in str(error)) == (1, True), str(error)
    assert isinstance(error, RankTimeout) == fault.hangs
    assert sorted(error.ranks) == [0, 1, 2]


@pytest.mark.soak
@pytest.mark.parametrize("start", ["forkserver", "spawn"])
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_twenty_of_twenty_are_named(fault: Fault, start: str) -> None:
    rounds = SOAK_ROUNDS if start == "forkserver" else 2
    for i in range(rounds):
        culprit = i % 3
        error = blamed(fault, culprit, nprocs=3, start=start)
        says = fault.says.replace("rank 1", f"rank {culprit}")
        if waits_for_rank_0(fault, culprit):
            says = "rank 0 of 3 did not come"
        assert (error.rank, says in str(error)) == (culprit, True), str(error)


@pytest.mark.parametrize("culprit", [0, 1])
def test_the_first_of_two_ranks_is_not_blamed_for_the_second(culprit: int) -> None:
    fault = next(f for f in FAULTS if f.run.__name__ == "exits_hard_0")
    assert blamed(fault, culprit, nprocs=2).rank == culprit


def test_an_early_return_from_ranks_that_stay_is_found_long_before_the_timeout() -> None:
    fault = next(f for f in FAULTS if f.run.__name__ == "returns_early")
    with (
        Ranks(2, timeout=300) as ranks,
        pytest.raises(RankFailed, match="returned while") as caught,
    ):
        ranks(fault.run, 1)
    assert caught.value.rank == 1
    assert not isinstance(caught.value, RankTimeout)
