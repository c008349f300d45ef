"""What observe() attaches to a training function inside a rank, without changing its code.

A step ends where an optimizer's step ends (the first one's, where several take turns). Of each
step: its length, the time this rank waited in communication (in Python's calls, in Work.wait, and
from its last gradient to the end of the backward, where DDP waits), the time it waited for data, in
optimizers, in torch.save and between a step and the next forward, CPU and run-queue time.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data.dataloader import _BaseDataLoaderIter

from pardemo.measure.evidence import Queue
from pardemo.measure.phases import PhaseWatch
from pardemo.measure.probes import AdamW, Wire, size_of
from pardemo.measure.quiet import finding_ddp
from pardemo.measure.roads import Road
from pardemo.measure.traffic import Counting, Traffic
from pardemo.measure.watched import RankRecord, StepRecord, Wrapper

CALLS = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "all_to_all",
    "all_to_all_single", "barrier", "broadcast", "gather", "recv", "reduce", "reduce_scatter",
    "reduce_scatter_tensor", "reduce_scatter_single", "scatter", "send",
)  # fmt: skip
ALONE = ("barrier", "send", "recv", "wait")  # carry nothing, or belong to a pipeline
TOTALS = (
    "communication", "data", "drained", "small", "optimizer", "saved", "outside", "backward",
    "searched",
)  # fmt: skip
SMALL = 256 * 1024  # bytes: below, a collective is mostly latency
COUNTED_STEP = 2  # the traffic of this step is counted, and its times are left out


class Recorder:
    """Attach with `with recorder.attached():`; `steps` grows by one per optimizer step."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.samples = 0
        self.traffic: Traffic | None = None
        self.last_gradient, self._last_queued = 0.0, 0
        self._queue = Queue()
        self._watch = PhaseWatch(before=self._updates, after=self._updated)
        self._depth = self._inside = 0  # nested waits, nested modules
        self._counting: Counting | None = None
        self._modules: list[DistributedDataParallel] = []
        self._graded: set[int] = set()
        self._hooked: set[int] = set()
        self._parameters_shapes: list[torch.Size] = []
        self._anchor, self._since = 0, set[int]()
        self._begin()

    def _begin(self) -> None:
        self._spent = dict.fromkeys(TOTALS, 0.0)
        self._backwards = self._forwards = self._small_calls = self._batch = 0
        self._start = self._mark = time.perf_counter()
        self._before_mark = 0.0  # waiting and saving of this step, before the mark
        self._open = True  # between a step and the next forward, or a backward and the optimizer
        self._waited_queued = 0.0
        self._queued, _, self._cpu = self._queue.read()

    def _apart(self) -> float:
        """What is no own work outside of the step's parts: it has a name already."""
        return self._spent["communication"] + self._spent["data"] + self._spent["saved"]

    def _shut(self) -> None:
        """Forward, backward or an optimizer begins: the time outside of them ends."""
        if self._open:
            passed = time.perf_counter() - self._mark - (self._apart() - self._before_mark)
            self._spent["outside"] += max(0.0, passed)
            self._open = False

    def _reopen(self) -> None:
        self._mark, self._before_mark, self._open = time.perf_counter(), self._apart(), True

    def _updates(self, optimizer: torch.optim.Optimizer) -> None:
        self._shut()
        self._optimizer_start, self._optimizer_apart = time.perf_counter(), self._apart()
        if not self._parameters_shapes:
            mine = [p for group in optimizer.param_groups for p in group["params"]]
            stock = type(optimizer).__module__.startswith("torch.optim.")  # no update to blame
            if not stock and not any(isinstance(p, DTensor) for p in mine):  # dear in any optimizer
                self._parameters_shapes = [p.shape for p in mine]

    def _updated(self, optimizer: torch.optim.Optimizer) -> None:
        taken = time.perf_counter() - self._optimizer_start
        self._spent["optimizer"] += taken - (self._apart() - self._optimizer_apart)
        if not self._anchor or id(optimizer) in self._since:
            self._anchor = id(optimizer)
        self._since.add(id(optimizer))
        if id(optimizer) == self._anchor:
            self._since.clear()
            self._end()
        else:
            self._reopen()

    def _end(self) -> None:
        """The step is over: write it down, and count the traffic of one of them."""
        queued, _, cpu = self._queue.read()
        spent = self._spent
        self.steps.append(
            StepRecord(
                wall_s=time.perf_counter() - self._start,
                cpu_s=(cpu - self._cpu) / 1e9,
                queued_s=(queued - self._queued) / 1e9,
                pushed_s=max(0.0, (queued - self._queued) / 1e9 - self._waited_queued),
                backwards=self._backwards,
                small_calls=self._small_calls,
                samples=self._batch,
                **{f"{name}_s": seconds for name, seconds in spent.items()},
            )
        )
        self._graded |= {id(p) for p in self._parameters() if p.grad is not None}
        if self._counting is not None:
            self._counting.__exit__(None, None, None)
            self.traffic, self._counting = self._counting.traffic(), None
        elif len(self.steps) == COUNTED_STEP:
            self._counting = Counting(self._watch).__enter__()
        self._begin()

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Watch everything that runs within."""
        with contextlib.ExitStack() as stack:
            self._modules = stack.enter_context(finding_ddp())
            for name in CALLS:
                if hasattr(dist, name):
                    stack.enter_context(_wrapped(dist, name, self._waiting("communication")))
            stack.enter_context(_wrapped(dist.Work, "wait", self._waiting("communication")))
            stack.enter_context(_wrapped(_BaseDataLoaderIter, "__next__", self._waiting("data")))
            stack.enter_context(_wrapped(torch, "save", self._waiting("saved")))
            stack.enter_context(_wrapped(torch.autograd, "backward", self._around_backward))
            if hasattr(DistributedDataParallel, "_post_forward"):
                search = _wrapped(DistributedDataParallel, "_post_forward", self._searching)
                stack.enter_context(search)
            stack.callback(register_module_forward_pre_hook(self._before_forward).remove)
            after = register_module_forward_hook(self._after_forward, always_call=True)
            stack.callback(after.remove)
            self._watch.open()
            stack.callback(self._watch.close)
            yield
        if self._counting is not None:
            self._counting.__exit__(None, None, None)

    def _waiting(self, total: str) -> Callable[..., Any]:
        """A wrapper that adds its time to one of the totals; nested calls count once."""

        def around(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            queued = self._queue.waited_ns() if self._depth == 1 else 0
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    taken = time.perf_counter() - start
                    self._spent[total] += taken
                    if total != "saved":
                        self._waited_queued += (self._queue.waited_ns() - queued) / 1e9
                    if total == "communication" and self._between() and self._is_small(call, args):
                        self._spent["small"] += taken
                        self._small_calls += 1

        return around

    def _between(self) -> bool:
        """Whether the script itself is running, and no forward, backward or optimizer."""
        return self._inside == 0 and self._watch.now() == "forward"

    def _is_small(self, call: Callable[..., Any], args: tuple[Any, ...]) -> bool:
        return call.__name__ not in ALONE and 0 < size_of(args) <= SMALL

    def _around_backward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """DDP waits for its buckets after the last gradient, inside of backward."""
        for parameter in self._parameters():
            if id(parameter) not in self._hooked and parameter.requires_grad:
                self._hooked.add(id(parameter))
                parameter.register_hook(self._gradient)
        self._open = self._open and self._forwards > 0  # a forward without modules: not seen
        self._shut()
        self.last_gradient = 0.0
        self._backwards += 1
        start, apart = time.perf_counter(), self._apart()
        try:
            return call(*args, **kwargs)
        finally:
            end = time.perf_counter()
            if self.last_gradient:
                self._spent["communication"] += end - self.last_gradient
                self._spent["drained"] += end - self.last_gradient
                self._waited_queued += (self._queue.waited_ns() - self._last_queued) / 1e9
            self._spent["backward"] += max(0.0, end - start - (self._apart() - apart))
            self._reopen()

    def _searching(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """After a forward DDP prepares its reducer, and looks for unused parameters if told to."""
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            self._spent["searched"] += time.perf_counter() - start

    def _gradient(self, gradient: torch.Tensor) -> None:
        self.last_gradient, self._last_queued = time.perf_counter(), self._queue.waited_ns()

    def _parameters(self) -> Iterator[torch.Tensor]:
        for module in self._modules:
            yield from module.parameters()

    def _before_forward(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        self._inside += 1
        if self._inside > 1 or not torch.is_grad_enabled():
            return
        self._shut()
        self._forwards += 1
        if args and isinstance(args[0], torch.Tensor) and args[0].dim():
            self.samples = self.samples or args[0].shape[0]
            self._batch = max(self._batch, args[0].shape[0])

    def _after_forward(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._inside = max(0, self._inside - 1)

    def record(self, value: Any, roads: tuple[Road, ...] = ()) -> RankRecord:
        """Everything that was seen."""
        return RankRecord(
            rank=dist.get_rank() if dist.is_initialized() else 0,
            threads=torch.get_num_threads(),
            samples=self.samples,
            steps=tuple(self.steps),
            traffic=self.traffic,
            wrappers=tuple(self._facts(module) for module in self._modules),
            value=value,
            roads=roads,
            wire=Wire.of(*self._group()),
            adamw=self._adamw(),
        )

    def _group(self) -> tuple[dist.ProcessGroup | None, torch.device]:
        """The group that gradients are summed in, and the device they lie on."""
        if not self._modules:
            return None, torch.get_default_device()
        largest = max(self._modules, key=lambda m: sum(p.numel() for p in m.parameters()))
        return largest.process_group, next(largest.parameters()).device

    def _adamw(self) -> AdamW | None:
        """How long torch's own AdamW takes, where the optimizer took a visible part of the step."""
        taken = sorted(step.optimizer_s for step in self.steps)
        length = sorted(step.wall_s for step in self.steps)
        if not taken or taken[len(taken) // 2] < 0.05 * length[len(length) // 2]:
            return None
        return AdamW.of(self._parameters_shapes)

    def _facts(self, module: DistributedDataParallel) -> Wrapper:
        log = module._get_ddp_logging_data()
        sizes = str(log.get("rebuilt_bucket_sizes") or log.get("bucket_sizes") or "")
        trained = [p for p in module.parameters() if p.requires_grad]
        return Wrapper(
            find_unused_parameters=module.find_unused_parameters,
            unused=sum(id(p) not in self._graded for p in trained),
            parameters_bytes=sum(p.numel() * p.element_size() for p in trained),
            buckets_bytes=tuple(int(s) for s in sizes.replace(",", " ").split()),
            cap_bytes=int(module.bucket_bytes_cap),
        )


@contextlib.contextmanager
def _wrapped(owner: Any, name: str, around: Callable[..., Any]) -> Iterator[None]:
    """Replace `owner.name` by a call of `around(original, ...)` for a while."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)
