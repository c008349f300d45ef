"""Captions for the suite's figures: the claim first, then the conditions; every number computed."""

from __future__ import annotations

from .table import ALL, ONE, Row, Table

Said = tuple[str, str]


def throughput(table: Table) -> Said:
    """What the throughput figure shows."""
    sound = [row for row in table.timed if row.status in ("ok", "noisy")]
    if not sound:
        return (
            "No bar can be trusted: the machine was busy with other work.",
            f"{_setting(table)} Pale bars are contaminated or oversubscribed.",
        )
    best = max(sound, key=lambda row: row.throughput or 0)
    claim = f"{best.name} trains {best.throughput:.3g} samples/s, the most of what can be trusted."
    return claim, f"{_setting(table)} Pale bars are not sound; dotted: predicted."


def samples(table: Table) -> Said:
    """What the samples figure shows."""
    spreads = {row.name: row.step.iqr_rel for row in table.timed if row.step is not None}
    widest = max(spreads, key=lambda name: spreads[name])
    claim = (
        f"The middle half of {widest}'s steps spans {spreads[widest]:.0%} of its median, "
        f"the widest of {len(spreads)}."
    )
    return claim, f"{_setting(table)} Nothing was left out; warm-up is recorded, not drawn."


def anatomy(table: Table) -> Said:
    """What the anatomy figure shows."""
    parts = [row for row in table.timed if row.compute_s is not None and row.step_s]
    if not parts:
        return (
            "No step was taken apart.",
            "anatomy was off, or the time limit had passed.",
        )
    most = max(parts, key=_transfer_share)
    claim = f"{most.name} waits longest for its transfers: {_transfer_share(most):.0%} of a step."
    return claim, (
        "Exposed transfer is what a step would save if its transfers cost nothing, by ablation; "
        "a part left of zero is noise around zero."
    )


def sent(table: Table) -> Said:
    """What the bytes figure shows."""
    counted, formula = table.counted(), table.formula()
    if not counted:
        return "Nothing was sent.", "One rank sends nothing."
    equal = [row.name for row in table.rows if row.name in formula and row.sent_as_formula]
    most, least = max(counted, key=counted.__getitem__), min(counted, key=counted.__getitem__)
    claim = (
        f"{most} sends {counted[most] / counted[least]:.3g} times the bytes of {least}; "
        f"the closed form is exact for {len(equal)} of {len(formula)}."
    )
    return claim, "Bytes one rank puts on the wire in one optimiser step, the busiest rank."


def memory(table: Table) -> Said:
    """What the memory figure shows."""
    peaks = {row.name: row.memory_bytes for row in table.rows if row.memory_bytes}
    if not peaks:
        return "Memory was not weighed.", ""
    least = min(peaks, key=lambda name: peaks[name] or 0)
    claim = f"A rank needs least under {least}: {(peaks[least] or 0) / 1e6:.3g} MB at its peak."
    return claim, (
        "Each part at its own largest, on the fullest rank; dotted: parameters, gradients, "
        "optimizer state and buffers by formula."
    )


def prediction(table: Table) -> Said:
    """How far the predictions were off."""
    errors = {row.name: row.error for row in table.timed if row.error is not None}
    if not errors:
        return "Nothing was predicted.", ""
    ranked = sorted(abs(error) for error in errors.values())
    middle = ranked[len(ranked) // 2]
    worst = max(errors, key=lambda name: abs(errors[name]))
    claim = f"The median error of {len(errors)} predictions is {middle:.0%}."
    return claim, (
        f"Worst: {worst}, {errors[worst]:+.0%}. Added up from parts timed alone in the same "
        "rounds, and from calibrated collectives; nothing was fitted to these steps."
    )


def _transfer_share(row: Row) -> float:
    return (row.exposed_s or 0.0) / (row.step_s or 1.0)


def _setting(table: Table) -> str:
    ranks = max((row.ranks for row in table.timed), default=1)
    rounds = next((row.step.rounds for row in table.timed if row.step), 0)
    return (
        f"{table.workload}, {table.batch_size} samples per step, {ranks} ranks x 1 thread beside "
        f"{ONE} and {ALL}; {rounds} interleaved rounds."
    )


def ledger(table: Table) -> Said:
    """What the table of bytes shows, line by line."""
    entries = [entry for book in table.book().ledgers for entry in book.entries]
    if not entries:
        return "Nothing was sent.", "One rank sends nothing."
    equal = sum(entry.equal for entry in entries)
    claim = f"{equal} of {len(entries)} lines are the closed form to the byte."
    return claim, (
        "One line per collective kind, mesh axis and phase of the step, on the rank that sends "
        "most; the formula was fed with the model's shapes, not with the count."
    )


def weighed(table: Table) -> Said:
    """What the table of memory shows, kind by kind."""
    rows = [row for row in table.scales().rows if row.formula]
    if not rows:
        return "No memory formula covers this optimizer.", ""
    errors = {row.strategy: row.peak_error for row in rows if row.peak_error is not None}
    same = sum(row.states_equal for row in rows)
    claim = f"What stays between steps is the formula's to the byte in {same} of {len(rows)} rows."
    if not errors:
        return claim, ""
    worst = max(errors, key=lambda name: abs(errors[name] or 0))
    return claim, (
        f"The peak is foreseen within {abs(errors[worst] or 0):.0%} (worst: {worst}) from the same "
        "states and the activations of one process on the rank's share; it leaves out what an "
        "operator holds for a moment. No forecast where layers are cut from within."
    )
