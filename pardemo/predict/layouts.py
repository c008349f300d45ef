"""All layouts of a model on a cluster: filtered by divisibility and memory, ranked by time.

    plan = layouts(model("llama3-405b"), Cluster(16384, profile="h100-dgx"), global_batch=2048)

Thousands of candidates are numpy columns, so the whole search is one evaluation of the physics.
The answer is three layouts with intervals, ties said, never a single point.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from pardemo.predict.columns import LAYOUT_KEYS, MODEL_KEYS, SCHEDULES, Columns, finish, take
from pardemo.predict.memory import RESIDUAL, total
from pardemo.predict.model import RECOMPUTE, Cluster, Layout, Transformer
from pardemo.predict.prediction import Prediction, human
from pardemo.predict.profile import Profile, load
from pardemo.predict.step import UNKNOWN_RESIDUAL, reach, step, step_seconds

MICROBATCHES = (1, 2, 4, 8, 16, 32)
CHUNKS = (1, 2, 4)


@dataclass(frozen=True)
class Choice:
    """One layout with its predicted time (interval) and memory; `fits` is "yes" or "perhaps"."""

    layout: Layout
    time_s: float
    lo_s: float
    hi_s: float
    memory_bytes: float
    fits: str
    tied: bool
    tokens_per_s_per_rank: float

    def __repr__(self) -> str:
        memory = f"{human(self.memory_bytes, 'bytes')}{'' if self.fits == 'yes' else ' (perhaps)'}"
        tie = ", tied with the best" if self.tied else ""
        return (
            f"{self.layout!r}: {human(self.time_s, 's')} ({human(self.lo_s, 's')} to "
            f"{human(self.hi_s, 's')}), {memory}{tie}"
        )


@dataclass(frozen=True)
class Plan:
    """The ranking: `.top` three choices, `.choices` more of them, and why the rest fell out."""

    model: Transformer
    cluster: Cluster
    global_batch: int
    evidence: str
    choices: tuple[Choice, ...]
    counts: dict[str, int]

    @property
    def top(self) -> tuple[Choice, ...]:
        """The three fastest layouts that fit."""
        return self.choices[:3]

    def __repr__(self) -> str:
        if not self.choices:
            return f"no layout of {self.model.name} fits {self.cluster!r}: {self._counted()}"
        best = self.choices[0]
        return (
            f"{self.counts['fit']} of {self.counts['tried']} layouts of {self.model.name} fit "
            f"{self.cluster.name}; best of them: {best!r} [{self.evidence}]"
        )

    def table(self, rows: int = 10) -> str:
        """A text table of the first `rows` choices, ties marked with ="""
        head = f"{'':1} {'time':>9} {'interval':>21} {'memory':>9} {'tok/s/rank':>10}  layout"
        lines = [repr(self.model), repr(self.cluster), self._counted(), head]
        for c in self.choices[:rows]:
            interval = f"{human(c.lo_s, 's')} to {human(c.hi_s, 's')}"
            memory = human(c.memory_bytes, "bytes") + ("" if c.fits == "yes" else "?")
            lines.append(
                f"{'=' if c.tied else ' '} {human(c.time_s, 's'):>9} {interval:>21} {memory:>9} "
                f"{c.tokens_per_s_per_rank:>10.0f}  {c.layout!r}"
            )
        lines.append(f"= tied with the best; ? may not fit. Evidence: {self.evidence}")
        return "\n".join(lines)

    def _counted(self) -> str:
        return "; ".join(f"{v:,} {k}" for k, v in self.counts.items())

    def picture(self, rows: int = 10, width: int = 60) -> str:
        """A picture in text: each choice's time | within its interval, from zero."""
        most = max(c.hi_s for c in self.choices[:rows])
        lines = []
        for c in self.choices[:rows]:
            low, mid, high = (round(width * t / most) for t in (c.lo_s, c.time_s, c.hi_s))
            bar = "#" * low + "=" * (mid - low) + "|" + "-" * (high - mid)
            lines.append(f"{bar:<{width + 2}} {human(c.time_s, 's'):>9}  {c.layout!r}")
        return "\n".join([*lines, "# to the low end, = to the prediction |, - to the high end"])

    def data(self) -> dict[str, list[float] | list[str]]:
        """Columns for a figure: label, time_s, lo_s, hi_s, memory_bytes, tied."""
        return {
            "label": [repr(c.layout) for c in self.choices],
            "time_s": [c.time_s for c in self.choices],
            "lo_s": [c.lo_s for c in self.choices],
            "hi_s": [c.hi_s for c in self.choices],
            "memory_bytes": [c.memory_bytes for c in self.choices],
            "tied": [float(c.tied) for c in self.choices],
        }

    def explain(self, profile: Profile | str | None = None, rank: int = 0) -> Prediction:
        """The term-by-term prediction of one choice."""
        return step(self.model, self.choices[rank].layout, profile or self.cluster.profile)


def divisors(n: int) -> list[int]:
    """All divisors of n in order."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def grid(model: Transformer, cluster: Cluster, global_batch: int) -> tuple[Columns, dict[str, int]]:
    """Columns of every layout that divides, and how many combinations were tried."""
    tps = [d for d in divisors(cluster.per_node) if model.heads % d == 0 and model.ffn % d == 0]
    tps = [t for t in tps if model.kv % t == 0 or t % model.kv == 0]
    pps = [d for d in divisors(cluster.ranks) if d <= model.layers]
    cps = [c for c in (1, 2, 4, 8, 16) if model.seq % (2 * c) == 0 and model.seq // c >= 1024]
    eps = divisors(model.experts) if model.experts else [1]
    axes = [tps, pps, cps or [1], eps, MICROBATCHES, (0, 1, 2, 3), (0, 1, 2), CHUNKS]
    table = np.array(list(itertools.product(*axes)), float)
    keys = ("tp", "pp", "cp", "ep", "microbatch", "zero", "recompute", "chunks")
    c: Columns = dict(zip(keys, table.T, strict=True))
    split = c["tp"] * c["pp"] * c["cp"]
    c["dp"] = np.where(cluster.ranks % split == 0, cluster.ranks // split, 0)
    per = c["dp"] * c["microbatch"]
    good = (c["dp"] > 0) & (global_batch % np.maximum(per, 1) == 0) & (per <= global_batch)
    good &= np.where(c["dp"] > 0, c["dp"] % c["ep"] == 0, False)
    # chunks need a pipeline, whole layers per chunk, and groups of p microbatches
    c["microbatches"] = np.where(good, global_batch // np.maximum(per, 1), 1.0)
    chunked = (c["pp"] > 1) & (c["microbatches"] % c["pp"] == 0)
    chunked &= c["chunks"] * c["pp"] <= model.layers
    good &= (c["chunks"] == 1) | chunked
    # gathering parameters or reducing gradients again for every microbatch does not pipeline
    good &= (c["zero"] < 2) | (c["pp"] == 1)
    tried = len(table)
    c = take(c, good)
    n = len(c["dp"])
    c |= {k: np.full(n, float(getattr(model, k))) for k in MODEL_KEYS}
    c["experts"] = np.full(n, float(model.experts))
    c["top_k"] = np.full(n, float(model.top_k if model.experts else 1))
    c["schedule"] = np.where(c["chunks"] > 1, float(SCHEDULES.index("interleaved")), 0.0)
    return finish(c, cluster.per_node), {"tried": tried, "divide": n}


def layouts(
    model: Transformer,
    cluster: Cluster,
    global_batch: int = 0,
    profile: Profile | str | None = None,
    keep: int = 50,
) -> Plan:
    """Rank every layout of `model` on `cluster` for `global_batch` sequences per step.

    global_batch 0 means about 4 million tokens, at least one sequence per rank. A layout "fits"
    when the upper end of its memory's interval does, "perhaps" when only its value does. Refused
    (ValueError) when the cluster is too large for the profile.
    """
    known = profile if isinstance(profile, Profile) else load(profile or cluster.profile)
    evidence = reach(known, cluster.nodes)
    global_batch = global_batch or 2 ** round(np.log2(max(4e6 / model.seq, cluster.ranks / 8)))
    c, counts = grid(model, cluster, global_batch)
    memory = total(c)
    perhaps = memory <= cluster.memory_bytes
    c, memory = take(c, perhaps), memory[perhaps]
    sure = memory * RESIDUAL[1] <= cluster.memory_bytes
    counts |= {"perhaps fit": int((~sure).sum()), "fit": int(sure.sum())}
    time = step_seconds(c, known) if len(memory) else np.zeros(0)
    # a layout that only perhaps fits must be clearly faster to come first
    order = np.argsort(time * np.where(sure, 1.0, 1.1), kind="stable")[:keep]
    residual = known.residual or UNKNOWN_RESIDUAL
    best = float(time[order[0]]) if len(order) else 0.0
    choices = []
    for i in order:
        t = float(time[i])
        choices.append(
            Choice(
                _layout(c, int(i)),
                t,
                t / (1 + residual["p90"]),
                t * (1 + residual["p90"]),
                float(memory[i]),
                "yes" if sure[i] else "perhaps",
                # what is wrong in the same way for both cancels in a ratio: the median remains
                t <= best * (1 + residual["median"]),
                global_batch * model.seq / t / cluster.ranks,
            )
        )
    return Plan(model, cluster, global_batch, evidence, tuple(choices), counts)


def _layout(c: Columns, i: int) -> Layout:
    whole: dict[str, Any] = {k: int(c[k][i]) for k in LAYOUT_KEYS}
    return Layout(
        **whole,
        recompute=RECOMPUTE[int(c["recompute"][i])],
        schedule="interleaved" if whole["chunks"] > 1 else "1f1b",
    )
