"""The formulas agree with a simulation that knows nothing of them."""

from __future__ import annotations

import pytest

from pardemo.cluster.young_daly import (
    LLAMA3_GPUS,
    LLAMA3_MTBF_S,
    cluster_mtbf_s,
    daly_s,
    simulate,
    waste,
    young_s,
)

SAVE_S, RESTART_S = 120.0, 300.0
LONG_S = 400 * 86_400.0


@pytest.mark.parametrize("interval_s", [300.0, 1_600.0, 8_000.0])
def test_the_expected_waste_is_what_the_simulation_meets(interval_s: float) -> None:
    expected = waste(interval_s, SAVE_S, LLAMA3_MTBF_S, RESTART_S)
    met = simulate(interval_s, SAVE_S, LLAMA3_MTBF_S, RESTART_S, LONG_S)
    assert met.waste == pytest.approx(expected, abs=0.01)
    assert met.failures == pytest.approx(met.clock_s / LLAMA3_MTBF_S, rel=0.06)


def test_no_other_interval_of_the_simulation_beats_dalys_by_more_than_chance() -> None:
    best = daly_s(SAVE_S, LLAMA3_MTBF_S)
    around = {k: simulate(best * k, SAVE_S, LLAMA3_MTBF_S, RESTART_S, LONG_S).waste
              for k in (0.25, 0.5, 1.0, 2.0, 4.0)}  # fmt: skip
    assert min(around, key=around.__getitem__) == 1.0


def test_dalys_interval_minimises_the_expected_waste() -> None:
    best = daly_s(SAVE_S, LLAMA3_MTBF_S)
    least = min(waste(best * (0.5 + k / 100), SAVE_S, LLAMA3_MTBF_S) for k in range(150))
    assert waste(best, SAVE_S, LLAMA3_MTBF_S) == pytest.approx(least, rel=1e-3)
    assert best < young_s(SAVE_S, LLAMA3_MTBF_S)


def test_published_failures_give_the_published_rate() -> None:
    assert pytest.approx(3.09, abs=0.01) == LLAMA3_MTBF_S / 3600
    device = LLAMA3_MTBF_S * LLAMA3_GPUS
    assert device / 86_400 / 365.25 == pytest.approx(5.78, abs=0.02)  # years, one GPU
    assert cluster_mtbf_s(device, 8) == pytest.approx(device / 8)


def test_a_perfect_run_wastes_only_its_saves() -> None:
    met = simulate(100.0, 10.0, 1e15, 0.0, 1000.0)
    assert (met.clock_s, met.failures) == (1100.0, 0)
    assert repr(met).endswith("0 failures: 9.1% wasted")


@pytest.mark.parametrize("save_s", [0.0, -1.0])
def test_a_save_takes_time(save_s: float) -> None:
    with pytest.raises(ValueError, match="save_s must be positive"):
        young_s(save_s, 100.0)
