"""diagnose(run): why more devices made it slower. Each cause with its evidence and a remedy.

A cause is named only where its own sign was seen (causes.py). What it costs is what its removal
would save, shared fairly between causes that hide each other (ledger.py), so that all costs
together are never more than the time that was lost. The order is by cost.
"""

from __future__ import annotations

from dataclasses import dataclass

from pardemo.measure.causes import suspects
from pardemo.measure.ledger import Parts, Suspect, costs
from pardemo.measure.observe import Run
from pardemo.measure.timing import milliseconds

VISIBLE = 0.03  # share of a step: a cause known by its time only must cost that much


@dataclass(frozen=True)
class Finding:
    """One cause of lost time: seconds per step it accounts for, what was seen, what to do."""

    cause: str
    lost_s: float
    evidence: str
    remedy: str

    def __repr__(self) -> str:
        cost = f"about {milliseconds(self.lost_s)} per step" if self.lost_s > 0 else "cost not seen"
        return f"{self.cause} ({cost})\n    seen: {self.evidence}\n    remedy: {self.remedy}"


@dataclass(frozen=True)
class Diagnosis:
    """All findings, the costliest first; empty where nothing stood out."""

    findings: tuple[Finding, ...]
    step_s: float
    load: tuple[str, ...] = ()

    @property
    def causes(self) -> list[str]:
        """The names, the costliest first."""
        return [finding.cause for finding in self.findings]

    @property
    def lost_s(self) -> float:
        """Seconds per step that all causes account for together."""
        return sum(finding.lost_s for finding in self.findings)

    def __bool__(self) -> bool:
        return bool(self.findings)

    def __repr__(self) -> str:
        lines = [f"a step takes {milliseconds(self.step_s)}"]
        lines += [f"{i}. {finding!r}" for i, finding in enumerate(self.findings, 1)]
        if not self.findings:
            lines.append("nothing stands out: what is left is computation and its transfer")
        lines += [f"not to be trusted: {said}" for said in self.load]
        return "\n".join(lines)


def diagnose(run: Run) -> Diagnosis:
    """Attribute the time of an observed run to its causes."""
    parts, found = Parts.of(run), suspects(run)
    while True:
        lost = costs(parts, [suspect.remove for suspect in found])
        kept = [
            suspect for suspect, cost in zip(found, lost, strict=True)
            if suspect.certain or cost >= VISIBLE * run.step_s
        ]  # fmt: skip
        if len(kept) == len(found):
            break
        found = kept
    findings = [_finding(suspect, cost) for suspect, cost in zip(found, lost, strict=True)]
    findings.sort(key=lambda finding: -finding.lost_s)
    return Diagnosis(tuple(findings), run.step_s, run.load)


def _finding(suspect: Suspect, cost: float) -> Finding:
    return Finding(suspect.cause, cost, suspect.evidence, suspect.remedy)
