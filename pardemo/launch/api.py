"""launch() and Ranks: run a function on several ranks and get their values back."""

from __future__ import annotations

import contextlib
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from pardemo.launch import progress, torchrun, watch
from pardemo.launch.results import Results
from pardemo.launch.session import Session, Setup
from pardemo.machine import machine


def launch(
    fn: Callable[..., Any],
    *args: Any,
    nprocs: int | None = None,
    threads: int = 1,
    timeout: float | None = 60.0,
    start: str = "forkserver",
    backend: str | None = None,
    seed: int | None = 0,
    echo: bool = True,
    env: dict[str, str] | None = None,
    debug: bool = False,
    **kwargs: Any,
) -> Results:
    """Run `fn(*args, **kwargs)` on `nprocs` new ranks and return their values, one per rank.

    Inside, torch.distributed's default process group is ready and Python, NumPy and torch are
    seeded with `seed + rank`. The function may come from a cell. Tensors come back detached, on
    the CPU. Under torchrun the function runs in place, as one rank of torchrun's world.

    nprocs: ranks; by default one per device, at least 2. threads: torch threads of each rank.
    timeout: seconds the ranks may take before RankTimeout; None for no limit.
    start: "forkserver", or "spawn" for torch.multiprocessing.spawn.
    backend: by default nccl where every rank has its own GPU, else gloo; "none" leaves
    init_process_group to `fn`. seed: None for a new one each time. echo: print what ranks print.
    env: more variables for the ranks. debug: have torch compare every collective's kind and shape
    between ranks first (TORCH_DISTRIBUTED_DEBUG=DETAIL): slow, and exact about mismatches.

    Raises RankFailed, which names the rank at fault; RankTimeout with every rank's stack.
    """
    ranks = Ranks(nprocs, threads, timeout, start, backend, seed, echo, env, debug)
    if ranks.in_place:
        return ranks.run(fn, args, kwargs)
    with _undisturbed():
        try:
            return ranks.run(fn, args, kwargs, last=True)
        finally:
            ranks.close()


class Ranks:
    """Ranks that stay, with their state, for several calls: `with Ranks(2) as ranks: ranks(fn)`.

    Takes the options of `launch`; `timeout` is that of each call. After a failure or a stop the
    ranks are gone: the next call says so and starts new ones.
    """

    def __init__(
        self,
        nprocs: int | None = None,
        threads: int = 1,
        timeout: float | None = 60.0,
        start: str = "forkserver",
        backend: str | None = None,
        seed: int | None = 0,
        echo: bool = True,
        env: dict[str, str] | None = None,
        debug: bool = False,
    ) -> None:
        if progress.in_rank():
            raise RuntimeError(
                "this already runs on a rank: launch from the notebook or the script"
            )
        self.in_place = torchrun.active() and torchrun.driver is None
        self.wanted = nprocs
        self.echo = echo
        usual = torchrun.driver.world_size if torchrun.driver else max(2, machine().devices)
        count = usual if nprocs is None else nprocs
        chosen = backend if self.in_place else _backend(backend, count)
        self.setup = Setup(
            count, threads, timeout, _start(start), chosen or "", seed, env or {}, debug
        )
        self._session: Session | None = None
        self._lost = False

    def __enter__(self) -> Ranks:
        if not self.in_place:
            with _undisturbed():
                self._ready()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __call__(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Results:
        """Run `fn(*args, **kwargs)` on every rank; what it defines globally stays there."""
        return self.run(fn, args, kwargs)

    def push(self, **values: Any) -> None:
        """Set global variables on every rank."""
        self.run(_push, (values,), {})

    def pull(self, name: str) -> list[Any]:
        """A global variable of every rank, by rank."""
        return list(self.run(_pull, (name,), {}))

    def status(self) -> list[dict[str, Any]]:
        """Of each rank: its number, process id, device, memory in bytes, and whether it lives."""
        from pardemo.launch.status import status

        return status(self._session.group if self._session else None, self.setup)

    def close(self) -> None:
        """End the ranks; the next call starts new ones."""
        with watch.interrupts_held():
            if self._session is not None:
                self._finalizer()
                self._session = None

    def _ready(self) -> Session:
        if self._session is not None and not self._session.alive:
            self.close()
            self._lost = True
        if self._session is None:
            if self._lost:
                print(f"note: {self.setup.nprocs} new ranks; the state of the old ones is gone")
            driven = torchrun.driver is not None and not callable(self.setup.start)
            opened = torchrun.driver.session if driven else Session
            self._session, self._lost = opened(self.setup, self.echo), False
            self._finalizer = weakref.finalize(self, self._session.close)
        return self._session

    def run(
        self,
        fn: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        last: bool = False,
        only: list[int] | None = None,
    ) -> Results:
        """Run a call on all ranks, or on those in `only`; the `last` one ends the ranks."""
        if self.in_place:
            return torchrun.run(fn, args, kwargs, self.wanted, self.setup)
        with _undisturbed():
            return self._run(fn, tuple(args), kwargs, last, only)

    def _run(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        last: bool,
        only: list[int] | None,
    ) -> Results:
        began = time.monotonic()
        session = self._ready()
        ready_s = time.monotonic() - began
        session.output.clear()
        values = session.call(fn, args, kwargs, last, only)
        return Results(
            values=tuple(values.values()),
            nprocs=self.setup.nprocs,
            threads=self.setup.threads,
            backend="nccl" if "nccl" in self.setup.backend else self.setup.backend,
            ready_s=ready_s,
            elapsed_s=time.monotonic() - began,
            output=session.output.text(),
        )


def _undisturbed() -> contextlib.AbstractContextManager[None]:
    """Interrupts arrive where the kernel waits for ranks; at once where it is a rank itself."""
    return contextlib.nullcontext() if torchrun.driver is not None else watch.interrupts_held()


def _start(start: str) -> str:
    if start not in ("forkserver", "spawn"):
        raise ValueError(f"start must be 'forkserver' or 'spawn', not {start!r}")
    if sys.platform != "linux":
        return "spawn"  # forking a process that has loaded torch is safe on Linux only
    return start


def _backend(backend: str | None, nprocs: int) -> str:
    if nprocs < 1:
        raise ValueError(f"nprocs must be at least 1, not {nprocs}")
    if backend in (None, "nccl") and machine().gpus and nprocs <= machine().devices:
        return "cpu:gloo,cuda:nccl"
    return backend or "gloo"


def _push(values: dict[str, Any]) -> None:
    vars(sys.modules["__main__"]).update(values)


def _pull(name: str) -> Any:
    found = vars(sys.modules["__main__"])
    if name not in found:
        raise NameError(f"name {name!r} is not defined on this rank")
    return found[name]
