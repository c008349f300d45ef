"""What a table means for this machine: which strategy to use here, why, and what not to believe."""

from __future__ import annotations

import re

from pardemo.machine import Machine

from .table import ALL, ONE, Row, Table

SOUND = ("ok", "noisy")


def verdict(table: Table) -> str:
    """A few sentences: the fastest, against both baselines, what holds the others back."""
    facts = _facts(table)
    sound = [row for row in table.timed if row.status in SOUND]
    strategies = [row for row in sound if row.name not in (ONE, ALL)]
    if not strategies:
        return "\n".join([*facts, *_untrusted(table)])
    best = min(strategies, key=lambda row: row.step_s or 0)
    unsound = [r for r in table.timed if r.status not in SOUND and r.name not in (ONE, ALL)]
    lines = [*facts, f"{table.workload}, batch {table.batch_size}: {_rank(best, strategies)}"]
    if unsound:
        times = ", ".join(f"{row.name} ({_ms(row)}, {row.status})" for row in unsound)
        lines.append(f"Not ranked, because their times cannot be trusted: {times}.")
    lines += [str(ratio) + "." for ratio in (best.vs_one, best.vs_all) if ratio is not None]
    lines += _advice(best, sound)
    held = [text for row in strategies if (text := _holds_back(row))]
    return "\n".join(lines + held)


def doubts(table: Table, here: Machine) -> list[str]:
    """Everything a reader should know before believing a number of this table."""
    reasons: dict[str, list[str]] = {}
    for row in table.timed:
        for warning in row.step.warnings if row.step else ():
            what, _, much = warning.partition("IQR/median ")
            key = "spread (IQR/median)" if much else what
            reasons.setdefault(key, []).append(f"{row.name} {much}".strip())
    said = [f"{key}: {', '.join(names)}" for key, names in reasons.items()]
    refused = [
        row.name
        for row in table.timed
        if any(ratio is not None and ratio.refused for ratio in (row.vs_one, row.vs_all))
    ]
    if refused:
        said.append(f"no speed-up is claimed, for the reasons above: {', '.join(refused)}")
    said += [f"not timed: {', '.join(names)}: {why}" for why, names in table.untimed().items()]
    for row in table.timed:
        said += [f"{row.name}: {note}" for note in row.traffic_notes]
    return [*said, *here.limits, *table.notes]


def _facts(table: Table) -> list[str]:
    """What holds however busy the machine was: equality, bytes and memory."""
    proven = [row for row in table.rows if row.equal and not row.reason]
    counted = [row for row in proven if row.sent_bytes and row.formula_bytes is not None]
    equal = [row for row in counted if row.sent_as_formula]
    lines = []
    if proven:
        lines.append(f"{len(proven)} strategies train to the same parameters as one process.")
    if counted:
        lines.append(f"The bytes sent equal the closed form in {len(equal)} of {len(counted)}.")
    for row in counted:
        lines += [f"{row.name}: {entry!r}." for entry in (row.ledger.unequal if row.ledger else ())]
    weighed = [row for row in table.scales().rows if row.formula]
    if weighed:
        same = sum(row.states_equal for row in weighed)
        lines.append(
            "Parameters, gradients, optimizer state and buffers weigh what the formula says in "
            f"{same} of {len(weighed)}."
        )
    peaks = {row.name: row.memory_bytes for row in proven if row.memory_bytes}
    if len(peaks) > 1:
        least = min(peaks, key=lambda name: peaks[name] or 0)
        lines.append(
            f"A rank needs least memory under {least}: {(peaks[least] or 0) / 1e6:.3g} MB."
        )
    return lines


def _untrusted(table: Table) -> list[str]:
    """Times that rank nothing: why, and what they were."""
    kinds: dict[str, str] = {}  # one of each kind: they differ only in their numbers
    for row in table.timed:
        for warning in row.step.warnings if row.step else ():
            kinds.setdefault(re.sub(r"[\d.]+", "", warning), warning)
    reasons = list(kinds.values())
    times = ", ".join(
        f"{row.name} {_ms(row)} ({row.step.lo_s * 1e3:.3g}-{row.step.hi_s * 1e3:.3g})"
        for row in table.timed if row.step is not None
    )  # fmt: skip
    why = f" Reasons: {'; '.join(reasons)}." if reasons else ""
    return [
        f"No ranking: no strategy's time could be trusted here and now.{why}",
        f"Seen all the same, with 95 % intervals, not to be quoted: {times}.",
        "Bytes, equality and memory above do not depend on how busy the machine was.",
    ]


def _rank(best: Row, strategies: list[Row]) -> str:
    """Whether the best median is really the fastest of the strategies, or ties with others."""
    ratios = {r.name: best.step.ratio(r.step) for r in strategies if r.step and best.step}
    ties = [name for name, ratio in ratios.items() if name != best.name and not ratio.different]
    where = f"({_ms(best)} per step on {best.ranks} ranks x {best.threads} threads)"
    if not ties:
        return f"of the strategies, {best.name} is fastest here {where}."
    tied = ", ".join(ties)
    return (
        f"of the strategies, {best.name} has the shortest median here {where}, and these rounds "
        f"cannot tell it from {tied}."
    )


def _advice(best: Row, sound: list[Row]) -> list[str]:
    """Whether to use the best strategy at all on this machine."""
    everything = next((row for row in sound if row.name == ALL), None)
    ratio = best.vs_all
    if everything is None or ratio is None or ratio.refused:
        return []
    if ratio.verdict == "slower":
        return [
            "To train this model on this machine, use one process with all cores: splitting the "
            "work over ranks costs more than it gains here. What the strategies buy is memory, and "
            "machines with more devices."
        ]
    if ratio.verdict == "faster":
        return [f"To train this model on this machine, use {best.name}."]
    return [f"Between {best.name} and one process with all cores this run cannot decide."]


def _holds_back(row: Row) -> str:
    """The largest part of a step that is not compute, when it is worth a sentence."""
    if row.step_s is None or row.exposed_s is None:
        return ""
    parts = {"waits for its transfers": row.exposed_s, "is idle": row.idle_s or 0.0}
    name, seconds = max(parts.items(), key=lambda item: item[1])
    share = seconds / row.step_s
    return f"{row.name} {name} for {share:.0%} of its step." if share >= 0.1 else ""


def _ms(row: Row) -> str:
    return f"{(row.step_s or 0) * 1e3:.3g} ms"
