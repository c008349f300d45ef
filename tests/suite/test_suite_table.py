"""Rows, the table, its verdict and doubts, on made-up times: what is said, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
import pytest

from pardemo import plot, suite
from pardemo.machine import machine
from pardemo.measure import Timing
from pardemo.suite import ALL, ONE, Row, Table, claims

HERE = dataclasses.replace(machine(), gpus=(), cores=2, load=0.1, waiting=0.0)


def timing(median_s: float, seed: int, load: Sequence[str] = (), ranks: int = 2) -> Timing:
    draw = np.random.default_rng(seed)
    rounds = [median_s * np.exp(draw.normal(0, 0.01, 5)) for _ in range(10)]
    return Timing.of(rounds, ranks=ranks, cores=2, load=load, session="one", label=f"{seed}")


def row(name: str, step: Timing | None, against: dict[str, Timing], **facts: object) -> Row:
    ratios = {}
    if step is not None:
        keys = {"vs_one": ONE, "vs_all": ALL}
        ratios = {k: step.ratio(against[v]) for k, v in keys.items() if name != v}
    return Row(
        name, name.title(), 2, 1, step=step, batch_size=64, **(ratios | facts)  # type: ignore[arg-type]
    )  # fmt: skip


def table(load: Sequence[str] = (), ddp_s: float = 0.06) -> Table:
    base = {ONE: timing(0.1, 0, load, ranks=1), ALL: timing(0.055, 1, load)}
    rows = [row(name, base[name], base) for name in base]
    rows.append(row("ddp", timing(ddp_s, 2, load), base, equal="2 ranks equal one process",
                    predicted_s=0.054, sent_bytes=4e6, formula_bytes=4e6, compute_s=0.04,
                    exposed_s=0.015, overlapped_s=0.0, idle_s=0.004, rest_s=0.001,
                    memory={"parameters_bytes": 4e6, "peak_bytes": 9e6}))  # fmt: skip
    rows.append(row("fsdp", timing(0.09, 3, load), base, equal="equal", sent_bytes=6e6,
                    formula_bytes=5e6, traffic_notes=("gloo reduces",)))  # fmt: skip
    rows.append(row("expert", None, base, reason="it has no experts"))
    rows.append(row("context", None, base, reason="it has no experts"))
    return Table("mlp", 64, tuple(rows), HERE.card())


def test_the_table_prints_time_interval_error_speedups_and_bytes() -> None:
    text = repr(table())
    line = next(line for line in text.splitlines() if line.startswith("ddp"))
    assert "-10%" in line
    assert "equal" in line
    assert "1.6" in line
    assert "not timed: expert, context: it has no experts" in text
    assert "5" in next(line for line in text.splitlines() if line.startswith("fsdp"))


def test_html_and_text_tell_the_same_numbers() -> None:
    made = table()
    text = made._repr_html_()
    for cell in made["ddp"].cells():
        assert cell in text


def test_the_verdict_prefers_one_process_with_all_cores_when_it_is_faster() -> None:
    said = suite.verdict(table())
    assert "ddp is fastest here" in said
    assert "use one process with all cores" in said
    assert "The bytes sent equal the closed form in 1 of 2." in said
    assert "ddp waits for its transfers for 25% of its step." in said


def test_the_verdict_names_ties_and_what_it_did_not_rank() -> None:
    made = table()
    first = made["ddp"]
    twin = dataclasses.replace(first, name="twin", step=timing(0.0603, 7))
    wild = Timing.of([[0.03, 0.09]] * 10, ranks=2, cores=2, session="one")
    unsound = dataclasses.replace(first, name="wild", step=wild)
    said = suite.verdict(dataclasses.replace(made, rows=(*made.rows, twin, unsound)))
    assert wild.status == "contaminated"
    assert "ddp has the shortest median here" in said
    assert "cannot tell it from twin." in said
    assert "Not ranked, because their times cannot be trusted: wild (60 ms, contaminated)." in said


def test_the_verdict_recommends_a_strategy_that_beats_both_baselines() -> None:
    assert "use ddp." in suite.verdict(table(ddp_s=0.03))


def test_on_a_busy_machine_nothing_is_ranked_and_the_doubts_say_why() -> None:
    busy = table(load=["load 9.0 on 2 cores"])
    assert "No ranking" in suite.verdict(busy)
    assert "2 strategies train to the same parameters" in suite.verdict(busy)
    doubts = suite.doubts(busy, HERE)
    assert doubts[0] == "load 9.0 on 2 cores: single, single on all cores, ddp, fsdp"
    assert any(said.startswith("no speed-up is claimed") for said in doubts)
    assert "fsdp: gloo reduces" in doubts
    assert "CONTAMINATED" in repr(busy)
    assert "refused" in repr(busy)
    assert claims.throughput(busy)[0].startswith("No bar can be trusted")


@pytest.mark.parametrize(
    "name", ["throughput", "samples", "anatomy", "sent", "memory", "prediction"]
)
def test_every_caption_claims_first_and_names_its_numbers(name: str) -> None:
    claim, conditions = getattr(claims, name)(table())
    assert any(letter.isdigit() for letter in claim)
    assert claim.endswith(".")
    assert conditions.endswith(".")


def test_every_figure_takes_the_table_as_it_is() -> None:
    made = table()
    assert "ddp 1.07e+03" in plot.throughput(made).alt or "ddp 1" in plot.throughput(made).alt
    assert "exposed transfer 15" in plot.anatomy(made).alt
    assert "ddp 4, equal" in plot.bytes(made.counted(), made.formula()).alt
    assert "ddp 60" in plot.dots(made.samples(), made.predictions()).alt
    assert "ddp" in plot.memory(made.memory(), made.memory_formula()).alt


def test_values_for_the_records_are_plain() -> None:
    for one in table().rows:
        json.dumps(one.values())
    assert table()["ddp"].values()["error"] == pytest.approx(-0.1, abs=0.02)
    with pytest.raises(KeyError, match="there are single"):
        table()["nothing"]
    assert len(table().frame()) == 6
