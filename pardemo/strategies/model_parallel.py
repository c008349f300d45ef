"""The model in consecutive parts on several devices, one part at work at a time (naive).

Split: the layers. Sent: at each of the n-1 boundaries the activations of the batch forward and
their gradient backward, 2 A bytes per boundary and step (A bytes of one boundary's activations); of
a parameter that two parts share, the gradient there and back. Idle: every device waits for the
others, (n-1)/n of the time when parts are equal. Memory: each device holds its part's parameters,
gradients, optimiser state and activations. The pipeline strategies keep the cut and fill the waits.

where="ranks": part r on rank r; activations travel by send and recv. where="devices": all parts in
one process, on cuda:0, cuda:1, ...; without GPUs all of them are the CPU and a transfer is only
counted. A model without `sequence()` is cut by torch's tracer, on ranks only: a pipeline of one
microbatch is the same thing. Cut: balanced by parameters, by given `costs`, or by hand (`starts`:
the names of the pieces at which part 1, 2, ... begin).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh

from pardemo.strategies import base, pipeline_build, pipeline_split
from pardemo.strategies.parts_on_devices import OnDevices, device_names
from pardemo.strategies.parts_on_ranks import OnRanks


def build(
    model: nn.Module, make_optimizer: base.MakeOptimizer, loss: base.Loss,
    mesh: DeviceMesh | None = None, *, where: str = "ranks",
    devices: int | Sequence[str] = 2, costs: Sequence[float] | None = None,
    starts: Sequence[str] | None = None, clip_grad: float | None = None,
) -> base.Step:  # fmt: skip
    """Cut `model` and place its parts on the ranks of the axis "pp", or on devices."""
    if where not in ("ranks", "devices"):
        raise base.StrategyError(f"where={where!r}: parts are put on 'ranks' or on 'devices'")
    place = base.axis(mesh, "pp")
    if where == "ranks" and place.size > 1 and not pipeline_split.is_sequence(model):
        return pipeline_build.build(
            model, make_optimizer, loss, mesh, schedule="gpipe", microbatches=1, cut=starts,
            balance="parameters" if costs is None else costs, clip_grad=clip_grad,
        )  # fmt: skip
    if where == "ranks":
        base.broadcast_module(model.to(base.this_device(mesh)), place.group)
        parts = cut_model(model, place.size, costs, starts)
        return OnRanks(model, parts, make_optimizer, loss, place, base.this_device(mesh), clip_grad)
    names = device_names(devices, base.this_device(mesh))
    parts = cut_model(model, len(names), costs, starts)
    return OnDevices(model, parts, make_optimizer, loss, names, clip_grad)


def cut_model(
    model: nn.Module, count: int, costs: Sequence[float] | None, starts: Sequence[str] | None
) -> list[list[tuple[str, nn.Module]]]:
    """The model's pieces, grouped into `count` parts; each rank finds the same ones."""
    found = base.pieces(model)
    base.check_pieces(model, found)
    if starts is not None:
        ranges = base.cut_by_hand([name for name, _ in found], starts, count)
    else:
        costs = base.parameter_costs(found) if costs is None else costs
        if len(costs) != len(found):
            raise base.StrategyError(
                f"{len(found)} pieces need {len(found)} costs, got {len(costs)}"
            )
        ranges = balanced(found, costs, count)
    return [[found[i] for i in part] for part in ranges]


def balanced(
    found: Sequence[tuple[str, nn.Module]], costs: Sequence[float], count: int
) -> list[range]:
    """The balanced cut that keeps normalisation layers shared by pieces within one part."""
    groups = base.inseparable(found)
    cuts = base.cut([sum(costs[i] for i in group) for group in groups], count)
    return [range(groups[c[0]][0], groups[c[-1]][-1] + 1) for c in cuts]


def reasons_against(model: nn.Module, world_size: int, batch_size: int) -> list[str]:
    """Models with fewer pieces than devices, or with parameters outside the pieces they name."""
    if not pipeline_split.is_sequence(model):
        return pipeline_build.reasons_against(model, world_size, world_size)
    try:
        found = base.pieces(model)
        balanced(found, base.parameter_costs(found), world_size)
        base.check_pieces(model, found)
    except base.StrategyError as error:
        return [str(error)]
    return []


STRATEGY = base.Strategy(
    name="model_parallel",
    title="model parallel (naive)",
    axes=("pp",),
    build=build,
    reasons_against=reasons_against,
    one_process=lambda knobs: knobs.get("where") == "devices",
    knobs={
        "where": "ranks (one process per part) or devices (one process for all)",
        "devices": "how many devices, or their names (where='devices')",
        "costs": "cost of each piece; default its parameters",
        "starts": "names of the pieces at which part 1, 2, ... begin",
        "clip_grad": "largest global gradient norm",
    },
    lesson="05_model_parallelism",
)
