"""What observe() attaches to a training function inside a rank, without changing its code.

A step ends where an optimizer's step ends. Of each step: its length, the time this rank waited in
communication (in Python's calls, in Work.wait, and from its last gradient to the end of the
backward, where DDP waits), the time it waited for data, CPU time and run-queue time of its thread.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data.dataloader import _BaseDataLoaderIter

from pardemo.measure.evidence import Queue
from pardemo.measure.phases import PhaseWatch
from pardemo.measure.quiet import finding_ddp
from pardemo.measure.roads import Road
from pardemo.measure.traffic import Counting, Traffic

CALLS = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "all_to_all",
    "all_to_all_single", "barrier", "broadcast", "gather", "recv", "reduce", "reduce_scatter",
    "reduce_scatter_tensor", "reduce_scatter_single", "scatter", "send",
)  # fmt: skip
COUNTED_STEP = 2  # the traffic of this step is counted, and its times are left out


@dataclass(frozen=True)
class StepRecord:
    """One step of one rank, in seconds; `own_s` is what it did without waiting for anybody.

    `queued_s` is time it was ready without a core, `pushed_s` the part of it outside of waiting.
    """

    wall_s: float
    communication_s: float
    data_s: float
    cpu_s: float
    queued_s: float
    backwards: int
    pushed_s: float = 0.0

    @property
    def own_s(self) -> float:
        """Work of this rank: the step without waiting for communication or data."""
        return max(0.0, self.wall_s - self.communication_s - self.data_s)

    @property
    def worked_s(self) -> float:
        """The same without the time in which it had no core: what it would take alone."""
        return max(0.0, self.own_s - self.pushed_s)


@dataclass(frozen=True)
class Wrapper:
    """Facts of one DDP module."""

    find_unused_parameters: bool
    unused: int
    parameters_bytes: int
    buckets_bytes: tuple[int, ...]
    cap_bytes: int = 0  # bucket_cap_mb


@dataclass(frozen=True)
class RankRecord:
    """What one rank's instruments saw."""

    rank: int
    threads: int
    samples: int
    steps: tuple[StepRecord, ...]
    traffic: Traffic | None
    wrappers: tuple[Wrapper, ...]
    value: Any = field(default=None, repr=False)
    roads: tuple[Road, ...] = ()


class Recorder:
    """Attach with `with recorder.attached():`; `steps` grows by one per optimizer step."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.samples = 0
        self.traffic: Traffic | None = None
        self.last_gradient, self._last_queued = 0.0, 0
        self._queue = Queue()
        self._watch = PhaseWatch(after=self._end)
        self._depth = 0
        self._counting: Counting | None = None
        self._modules: list[DistributedDataParallel] = []
        self._graded: set[int] = set()
        self._hooked: set[int] = set()
        self._begin()

    def _begin(self) -> None:
        self._communication = self._data = self._waited_queued = 0.0
        self._backwards = 0
        self._start = time.perf_counter()
        self._queued, _, self._cpu = self._queue.read()

    def _end(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer has stepped: close the step, and count the traffic of one of them."""
        queued, _, cpu = self._queue.read()
        self.steps.append(
            StepRecord(
                time.perf_counter() - self._start,
                self._communication,
                self._data,
                (cpu - self._cpu) / 1e9,
                (queued - self._queued) / 1e9,
                self._backwards,
                max(0.0, (queued - self._queued) / 1e9 - self._waited_queued),
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
                    stack.enter_context(_wrapped(dist, name, self._waiting("_communication")))
            stack.enter_context(_wrapped(dist.Work, "wait", self._waiting("_communication")))
            stack.enter_context(_wrapped(_BaseDataLoaderIter, "__next__", self._waiting("_data")))
            stack.enter_context(_wrapped(torch.autograd, "backward", self._around_backward))
            handle = register_module_forward_pre_hook(self._before_forward)
            stack.callback(handle.remove)
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
                    setattr(self, total, getattr(self, total) + taken)
                    self._waited_queued += (self._queue.waited_ns() - queued) / 1e9

        return around

    def _around_backward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """DDP waits for its buckets after the last gradient, inside of backward."""
        for parameter in self._parameters():
            if id(parameter) not in self._hooked and parameter.requires_grad:
                self._hooked.add(id(parameter))
                parameter.register_hook(self._gradient)
        self.last_gradient = 0.0
        self._backwards += 1
        try:
            return call(*args, **kwargs)
        finally:
            if self.last_gradient:
                self._communication += time.perf_counter() - self.last_gradient
                self._waited_queued += (self._queue.waited_ns() - self._last_queued) / 1e9

    def _gradient(self, gradient: torch.Tensor) -> None:
        self.last_gradient, self._last_queued = time.perf_counter(), self._queue.waited_ns()

    def _parameters(self) -> Iterator[torch.Tensor]:
        for module in self._modules:
            yield from module.parameters()

    def _before_forward(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if not self.samples and args and isinstance(args[0], torch.Tensor) and args[0].dim():
            self.samples = args[0].shape[0]

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
        )

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
