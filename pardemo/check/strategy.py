"""strategy(): train a strategy on ranks beside one process, and compare them after every step."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from pardemo import strategies
from pardemo.check.same import Trace, same
from pardemo.check.verdict import Verdict
from pardemo.launch import RankFailed, launch
from pardemo.strategies import Step, Strategy, StrategyError, base, routing
from pardemo.workloads import Workload, workload


def strategy(
    which: str | Strategy | Callable[..., Step],
    work: str | Workload,
    nprocs: int = 2,
    steps: int = 3,
    *,
    batch_size: int | Sequence[int] | None = None,
    axes: tuple[str, ...] = ("dp",),
    shape: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float64,
    tolerance: float | None = None,
    ranks: Any = None,
    timeout: float = 120.0,
    **knobs: Any,
) -> Verdict:
    """Prove a strategy equal to one process: another seed on every rank, every step compared.

    `which` is a registered name, a Strategy, or a build function (whose mesh has `axes`). One
    `batch_size` per step may be given, so that a last odd batch is covered. float64 leaves an
    error of the algorithm nowhere to hide; `tolerance` is for strategies that round on purpose.
    Layers that drop values at random are switched off on both sides, and the verdict says so.
    `ranks` takes a warm `launch.Ranks` of `nprocs` ranks. Raises StrategyError when the strategy
    does not fit.
    """
    work = workload(work) if isinstance(work, str) else work
    row = find(which, axes)
    given = batch_size if batch_size is not None else work.batch_size
    sizes = list(given) if isinstance(given, Sequence) else [given] * steps
    against = row.reasons_against(work.make_model(0), nprocs, min(sizes))
    if against:
        raise StrategyError(f"{row.name} does not fit {work.name}: {'; '.join(against)}")
    devices, knobs = row.place(nprocs, knobs)
    arguments = (row, work, sizes, dtype, shape, knobs)
    run = partial(launch, nprocs=devices, timeout=timeout) if ranks is None else ranks
    try:
        results: Any = (
            [train(*arguments, alone=True)] if devices == 1 else list(run(train, *arguments))
        )
    except RankFailed as error:
        refused = _REFUSED.match(str(error))
        if refused is None:
            raise
        raise StrategyError(f"{row.name} cannot train {work.name}: {refused[1]}") from error
    reference = train(strategies.get("single"), work, sizes, dtype, (), {}, alone=True)
    notes = tuple(dict.fromkeys(note for trace in results for note in trace.notes))
    said = same(results, reference, tolerance)
    splits = not set(row.axes or ("dp",)) <= {"tp", "cp"}
    if not said and splits and (why := no_mean(work, max(sizes))):
        raise StrategyError(f"{row.name} cannot train {work.name}: {why}")
    return _told(said, notes, work.make_model(0))


_REFUSED = re.compile(r"rank \d+ of \d+ raised StrategyError: (.*)")


@torch.no_grad()
def no_mean(work: Workload, size: int) -> str:
    """Why a batch's loss is not the mean over its parts, which all that split it need; else "".

    A mixture of experts balances over the whole batch: that its loss is no mean is no fault.
    """
    model = work.make_model(0).double().train(False)
    if routing.seams(model):
        return ""
    batch = cast(work.make_batch(size, 0, 0), torch.float64)
    parts = [base.map_tensors(lambda t: t[:1], batch), base.map_tensors(lambda t: t[1:], batch)]
    whole, one, rest = (
        float(work.loss(base.call(model, inputs), targets)) for inputs, targets in [batch, *parts]
    )
    mean = (one + (size - 1) * rest) / size
    if abs(whole - mean) <= 1e-7 * max(abs(whole), abs(mean)):
        return ""
    return (
        f"the loss of {size} samples is {whole:.6g}, but the mean of one and the rest is "
        f"{mean:.6g}, so ranks that split a batch train something else: dim 0 of every tensor must "
        "count samples (batch_first=True in torch's layers), and the loss be a mean over them, "
        "each weighing the same"
    )


def _told(said: Verdict, notes: tuple[str, ...], model: nn.Module) -> Verdict:
    """The verdict with what the strategy noted, and with the likely cause of a drifting buffer."""
    buffers = [name for name, _ in model.named_buffers() if f": {name} is off by" in said.text]
    if not said and buffers:
        notes += (
            f"{buffers[0]} is a buffer that the model updates from the samples it sees, and a rank "
            "sees a part of them: only a BatchNorm's are added up over ranks",
        )
    return replace(said, text="; ".join([said.text, *notes]))


def find(which: str | Strategy | Callable[..., Step], axes: tuple[str, ...] = ("dp",)) -> Strategy:
    """The registered strategy, or a build function of the learner's dressed as one."""
    if isinstance(which, str):
        return strategies.get(which)
    if isinstance(which, Strategy):
        return which
    return Strategy(getattr(which, "__name__", "build"), "your own", axes, which)


def train(
    row: Strategy, work: Workload, sizes: list[int], dtype: torch.dtype, shape: tuple[int, ...],
    knobs: dict[str, Any], alone: bool = False,
) -> Trace:  # fmt: skip
    """One training run from one rank's view: the loss and the full state after every step.

    Ranks build their models from different seeds, so a strategy that forgets to broadcast rank 0's
    parameters is caught. `alone`: no ranks, seed 0.
    """
    rank = 0 if alone or not dist.is_initialized() else dist.get_rank()
    mesh = None if alone else row.mesh(shape=shape)
    model = work.make_model(rank).to(dtype)
    off = stop_dropping(model)
    step = row.build(model, work.make_optimizer, work.loss, mesh, **knobs)
    losses, states = [], []
    for number, size in enumerate(sizes):
        batch = work.make_batch(size, number, 0)
        losses.append(float(step.step(cast(batch, dtype))))
        states.append(step.state())
    notes = tuple(getattr(step, "notes", ()))
    if off:
        notes += (
            f"dropout was off in the comparison ({', '.join(off[:3])}"
            f"{f' and {len(off) - 3} more' if len(off) > 3 else ''}): ranks that split a batch "
            "draw other random numbers than one process",
        )
    return Trace(tuple(losses), tuple(states), notes)


def stop_dropping(model: nn.Module) -> list[str]:
    """Set every probability of dropping a value to 0, in place; returns whose it was, and what.

    Layers of torch's and their like say it as `p` or as `dropout`. What a forward function drops by
    itself is not found.
    """
    found = []
    for path, module in model.named_modules():
        name = "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "dropout"
        chance = getattr(module, name, None)
        if isinstance(chance, float) and chance > 0:
            setattr(module, name, 0.0)
            found.append(f"{path or type(module).__name__} {chance:g}")
    return found


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """The batch with its floating-point tensors in `dtype`."""
    return base.map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, batch)
