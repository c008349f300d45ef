"""Rates and latencies are checked values; nothing else reaches `tc`."""

from __future__ import annotations

import pytest

from pardemo.cluster import Link, link
from pardemo.parameters import Refused


def test_a_rate_is_read_in_base_ten() -> None:
    assert link("100mbit").rate_bits == 1e8
    assert link("2.5gbit").bytes_per_s == 2.5e9 / 8
    assert link("unlimited") == link(None) == Link(None, None)


@pytest.mark.parametrize(
    "rate",
    ["1gbit; rm -rf /", "$(id)", "-1gbit", "fast", "1tbit", "", "1gbit\nqdisc", "1e9", 5, True],
)  # fmt: skip
def test_anything_else_is_refused(rate: object) -> None:
    with pytest.raises(Refused, match="rate"):
        link(rate)  # type: ignore[arg-type]


@pytest.mark.parametrize("latency", [-1, 1001, float("nan"), "5"])
def test_a_latency_out_of_range_is_refused(latency: object) -> None:
    with pytest.raises(Refused, match="latency"):
        link("1gbit", latency)  # type: ignore[arg-type]


def test_latency_is_a_queue_below_the_rate() -> None:
    lines = link("1gbit", 5).lines("eth0", latency=True, fresh=True)
    assert [line.split()[5:8] for line in lines] == [
        ["root", "handle", "1:"],
        ["parent", "1:", "handle"],
    ]
    assert not any("netem" in line for line in link("1gbit", 5).lines("port0", latency=False))


def test_what_passes_at_once_is_said_and_set() -> None:
    assert [link(rate).burst_bytes for rate in ("1gbit", "100mbit", "1mbit")] == [
        250_000, 25_000, 16_000
    ]  # fmt: skip
    assert link().burst_bytes == 0
    assert "burst 250000 " in link("1gbit").lines("eth0", latency=False)[-1]


def test_a_link_says_itself() -> None:
    assert repr(link("100mbit", 2)) == "100 Mbit/s, 2 ms one way"
    assert repr(link()) == "unlimited"
