"""What runs inside a rank for the suite: build a strategy's step, and look at one step closely."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from pardemo import strategies
from pardemo.measure import Traffic, count, weigh
from pardemo.measure.traffic import Flow
from pardemo.strategies import Step, routing
from pardemo.strategies.base import to_device
from pardemo.workloads import Workload

from .forms import Routed


@dataclass(frozen=True)
class Maker:
    """Builds one strategy's step inside a rank: `Maker(...)(mesh)` is a step without arguments.

    `one_thread` is for a process that drives several devices by itself: on a CPU each of its
    devices is a core, so torch may use one thread at a time.
    """

    strategy: str
    work: Workload
    batch_size: int
    knobs: tuple[tuple[str, Any], ...] = ()
    one_thread: bool = False

    def build(self, mesh: DeviceMesh | None) -> tuple[Step, Any]:
        """The strategy at work on this rank, and the global batch on its device."""
        row = strategies.get(self.strategy)
        model = self.work.make_model(0)
        made = row.build(model, self.work.make_optimizer, self.work.loss, mesh, **dict(self.knobs))
        device = next((p.device for p in made.model.parameters()), torch.device("cpu"))
        return made, to_device(self.work.make_batch(self.batch_size, 0, 0), device)

    def __call__(self, mesh: DeviceMesh | None) -> Callable[[], Any]:
        made, batch = self.build(mesh)

        def step() -> Any:
            if self.one_thread:
                torch.set_num_threads(1)
            return made.step(batch)

        return step


@dataclass(frozen=True)
class Seen:
    """One step of one rank, looked at outside of any timing."""

    traffic: Traffic
    routed: Routed
    memory: dict[str, float]
    peak_at: str = ""
    notes: tuple[str, ...] = ()

    @property
    def sent_bytes(self) -> float:
        """Bytes this rank put on the wire."""
        return self.traffic.sent_bytes()


def look(maker: Maker, ranks: int, warmup: int = 2) -> Seen | None:
    """Count what this rank sends in one step, and weigh what it keeps (collective call).

    None on ranks that a strategy of fewer `ranks` does not use.
    """
    if dist.get_rank() >= ranks:
        return None
    strategy = strategies.get(maker.strategy)
    made, batch = maker.build(strategy.mesh() if ranks > 1 else None)
    for _ in range(warmup):
        made.step(batch)
    traffic = count(lambda: made.step(batch))
    phases = getattr(made, "phases", None)
    if phases is not None:  # one process drives its devices: copies between them are the transfer
        traffic = _copies(phases)
    routed = _routed(made.model)
    return Seen(traffic, routed, *_weigh(made, batch), tuple(getattr(made, "notes", ())))


COPIES = {  # phases of nn.DataParallel as collectives: (kind, phase of the step)
    "replicate": ("broadcast", "forward"),
    "scatter": ("scatter", "forward"),
    "gather": ("gather", "forward"),
    "output gradients": ("scatter", "backward"),
    "reduce": ("reduce", "backward"),
}


def _copies(phases: Any) -> Traffic:
    """The copies between the devices of one process, as the strategy counted them itself."""
    note = "counted: all copies between the devices of this one process"
    sizes = {**phases.bytes, "output gradients": phases.output_gradient_bytes}
    return Traffic(0, tuple(
        Flow(kind, "devices", phase, phases.replicas, 1, sizes[name],  # type: ignore[arg-type]
             float(sizes[name]), float(sizes[name]), note)
        for name, (kind, phase) in COPIES.items() if sizes.get(name)
    ))  # fmt: skip


def _routed(model: torch.nn.Module) -> Routed:
    """Where the routers of the last step sent this rank's rows."""
    layers = routing.seams(model)
    gates = [layer for layer in layers if getattr(layer, "choices", None) is not None]
    return Routed(
        away=tuple(getattr(layer.exchange, "away_rows", 0) for layer in layers),
        guests=tuple(getattr(layer.exchange, "guest_rows", 0) for layer in layers),
        kept=tuple(int(layer.choices.sum()) - layer.dropped for layer in gates),
    )


def _weigh(made: Step, batch: Any) -> tuple[dict[str, float], str]:
    """Memory of one step by kind, as plain numbers, and when it was most."""
    report = weigh(lambda: made.step(batch), made.model)
    names = ("parameters", "gradients", "optimizer", "activations", "buffers", "peak")
    sizes = {f"{name}_bytes": float(getattr(report, f"{name}_bytes")) for name in names}
    return sizes, report.peak_at
