"""Bytes sent per rank per optimiser step, in closed form, for every strategy.

    sent_bytes("ddp", ranks=4, parameters=1_000_000, buckets=2)

Names in the formulas: P parameters, b bytes per element, n ranks of the group, m microbatches,
A bytes of one microbatch's activation at a boundary. The rules themselves live in
`sent_rules.py`; here is what they return and how they are looked up and added.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from pardemo.predict.prediction import Prediction, Term, human
from pardemo.predict.wire import broadcast_copies, kind_of, wire_bytes


@dataclass(frozen=True)
class Message:
    """All calls of one collective kind on one mesh axis in one phase of a step, for one rank.

    `phase` is "forward", "backward" or "optimizer"; `ranks` how many take part in one call.
    `beside`: the rank computes while it is under way.
    """

    kind: str
    axis: str
    calls: int
    payload_bytes: float
    sent_bytes: float
    formula: str
    phase: str = "backward"
    ranks: int = 0
    beside: bool = False

    def __repr__(self) -> str:
        payload, sent = human(self.payload_bytes, "bytes"), human(self.sent_bytes, "bytes")
        head = f"{self.phase}: {self.calls} x {self.kind} on {self.axis}"
        return f"{head}: {payload}, sent {sent} = {self.formula}"


@dataclass(frozen=True)
class SentBytes:
    """What one rank sends in one step; `.total` bytes, `.by_kind()`, `.calls(kind)`, `a + b`."""

    strategy: str
    messages: tuple[Message, ...]

    @property
    def total(self) -> float:
        """Bytes sent per rank per step, over all kinds and axes."""
        return float(sum(m.sent_bytes for m in self.messages))

    def by_kind(self) -> dict[str, float]:
        """Sent bytes per collective kind."""
        out: dict[str, float] = {}
        for m in self.messages:
            out[m.kind] = out.get(m.kind, 0.0) + m.sent_bytes
        return out

    def by_axis(self) -> dict[str, float]:
        """Sent bytes per mesh axis ("dp", "tp", "pp", "cp", "ep", "loss")."""
        out: dict[str, float] = {}
        for m in self.messages:
            out[m.axis] = out.get(m.axis, 0.0) + m.sent_bytes
        return out

    def by_phase(self) -> dict[str, float]:
        """Sent bytes per phase: "forward", "backward", "optimizer"."""
        out: dict[str, float] = {}
        for m in self.messages:
            out[m.phase] = out.get(m.phase, 0.0) + m.sent_bytes
        return out

    def calls(self, kind: str) -> int:
        """How many times one rank calls `kind` in one step."""
        return sum(m.calls for m in self.messages if m.kind == kind_of(kind))

    def payload(self, kind: str) -> float:
        """Payload bytes of all calls of `kind` in one step (whole arrays)."""
        return float(sum(m.payload_bytes for m in self.messages if m.kind == kind_of(kind)))

    def __add__(self, other: SentBytes) -> SentBytes:
        return SentBytes(f"{self.strategy} + {other.strategy}", self.messages + other.messages)

    def __float__(self) -> float:
        return self.total

    def __repr__(self) -> str:
        if not self.messages:
            return f"{self.strategy}: sends nothing"
        parts = "; ".join(repr(m) for m in self.messages)
        return f"{self.strategy}: {human(self.total, 'bytes')} sent per rank per step ({parts})"

    def prediction(self) -> Prediction:
        """The same as a `Prediction`, one term per message."""
        terms = tuple(
            Term(f"{m.axis} {m.kind}, {m.phase}", m.formula, m.sent_bytes, "bytes")
            for m in self.messages
        )
        return Prediction(f"bytes sent per rank, {self.strategy}", terms, "bytes")


def message(
    kind: str,
    axis: str,
    ranks: int,
    payload_bytes: float,
    formula: str,
    calls: int = 1,
    implementation: str = "textbook",
    phase: str = "backward",
) -> Message:
    """One line of traffic: `payload_bytes` is the sum over the `calls`."""
    sent = wire_bytes(kind, payload_bytes, ranks, implementation)
    return Message(kind_of(kind), axis, calls, float(payload_bytes), sent, formula, phase, ranks)


def broadcast(
    axis: str,
    ranks: int,
    from_root: Mapping[int, float],
    rank: int,
    formula: str,
    calls: int = 1,
    implementation: str = "textbook",
    phase: str = "backward",
) -> Message:
    """What `rank` sends of broadcasts of `from_root[root]` bytes by each root, in `calls` calls."""
    sent = sum(
        size * broadcast_copies(ranks, (rank - root) % ranks, implementation)
        for root, size in from_root.items()
    )
    payload = float(sum(from_root.values()))
    return Message("broadcast", axis, calls, payload, float(sent), formula, phase, ranks)


Rule = Callable[..., list[Message]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a closed form under the strategy's names."""

    def register(fn: Rule) -> Rule:
        for name in names:
            RULES[name] = fn
        return fn

    return register


def sent_bytes(strategy: str, *, loss_bytes: float = 0.0, **knobs: object) -> SentBytes:
    """Bytes one rank sends in one optimiser step of `strategy`, split by collective kind.

    Knobs by strategy are the keyword arguments of the functions in `sent_rules.py`, for instance
    `sent_bytes("fsdp", ranks=4, parameters=P, root=P_root, microbatches=2)`. `loss_bytes` adds the
    all-reduce of the reported loss (4 for one float32) over all `ranks`; it is 0 by default.
    Raises ValueError for an unknown strategy, TypeError for an unknown knob.
    """
    for module in ("sent_rules", "sent_model_rules"):
        importlib.import_module(f"pardemo.predict.{module}")  # they register their rules
    if strategy not in RULES:
        raise ValueError(f"no closed form for {strategy!r}; there are {sorted(RULES)}")
    try:
        found = list(RULES[strategy](**knobs))
    except TypeError as error:
        raise TypeError(f"sent_bytes({strategy!r}): {error}") from None
    if loss_bytes:
        ranks = int(str(knobs.get("ranks", 1)))
        text = "2(n-1)/n * loss"
        found.append(message("all_reduce", "loss", ranks, loss_bytes, text, phase="forward"))
    return SentBytes(strategy, tuple(m for m in found if m.calls and m.payload_bytes))


def padded(shapes: Iterable[Iterable[int]], ranks: int) -> int:
    """Elements after every parameter's dim 0 is padded to a multiple of `ranks`, as FSDP2 does.

    `shapes` are parameter shapes; a shape of 2 parameters, (5, 3) and (4,), padded for 2 ranks is
    6*3 + 4 = 22 elements. Use it for `parameters` and `root` when shapes do not divide evenly.
    """
    total = 0
    for shape in shapes:
        dims = [int(d) for d in shape] or [1]
        rest = 1
        for d in dims[1:]:
            rest *= d
        total += -(-dims[0] // ranks) * ranks * rest
    return total
