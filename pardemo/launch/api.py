"""launch() and Ranks: run a function on several ranks and get their values back."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

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

    Inside, torch.distributed's default process group is ready and Python, NumPy and torch are seeded
    with `seed + rank`. The function may come from a cell. Tensors come back detached, on the CPU.

    nprocs: ranks; by default one per device, at least 2. threads: torch threads of each rank.
    timeout: seconds the ranks may take before RankTimeout; None for no limit.
    start: "forkserver", or "spawn" for torch.multiprocessing.spawn. backend: by default nccl where every
    rank has a GPU, else gloo; "none" leaves init_process_group to `fn`. seed: None for a new one each
    time. echo: print what ranks print. env: variables for the ranks. debug: check every collective's
    kind and shape on all ranks first (TORCH_DISTRIBUTED_DEBUG=DETAIL), slow and exact.

    Raises RankFailed, which names the rank at fault.
    """
    ranks = Ranks(nprocs, threads, timeout, start, backend, seed, echo, env, debug)
    try:
        return ranks._run(fn, args, kwargs, last=True)
    finally:
        ranks.close()


class Ranks:
    """Ranks that stay, with their state, for several calls: `with Ranks(2) as ranks: ranks(fn)`."""

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
        here = machine()
        count = max(2, here.devices) if nprocs is None else nprocs
        if count < 1:
            raise ValueError(f"nprocs must be at least 1, not {count}")
        if start not in ("forkserver", "spawn"):
            raise ValueError(f"start must be 'forkserver' or 'spawn', not {start!r}")
        if start == "forkserver" and sys.platform != "linux":
            start = "spawn"  # forking a process that has loaded torch is safe on Linux only
        if backend is None:
            backend = "nccl" if 0 < count <= len(here.gpus) else "gloo"
        self.echo = echo
        self.setup = Setup(count, threads, timeout, start, backend, seed, env or {}, debug)
        self._session: Session | None = None
        self._lost = False

    def __enter__(self) -> Ranks:
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
        """Run `fn(*args, **kwargs)` on every rank; what it leaves in `__main__` stays there."""
        return self._run(fn, args, kwargs, last=False)

    def push(self, **values: Any) -> None:
        """Set variables in every rank's `__main__`."""
        self._run(_push, (values,), {}, last=False)

    def pull(self, name: str) -> list[Any]:
        """A variable of every rank's `__main__`, by rank."""
        return list(self._run(_pull, (name,), {}, last=False))

    def close(self) -> None:
        """End the ranks; the next call starts new ones."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def _ready(self) -> Session:
        if self._session is not None and not self._session.alive:
            self._session.close()
            self._session, self._lost = None, True
        if self._session is None:
            if self._lost:
                print(f"note: {self.setup.nprocs} new ranks; the state of the old ones is gone")
            self._session, self._lost = Session(self.setup, self.echo), False
        return self._session

    def _run(
        self,
        fn: Callable[..., Any],
        args: Any,
        kwargs: Any,
        last: bool,
        only: list[int] | None = None,
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
            backend=self.setup.backend,
            ready_s=ready_s,
            elapsed_s=time.monotonic() - began,
            output=session.output.text(),
        )


def _push(values: dict[str, Any]) -> None:
    vars(sys.modules["__main__"]).update(values)


def _pull(name: str) -> Any:
    found = vars(sys.modules["__main__"])
    if name not in found:
        raise NameError(f"name {name!r} is not defined on this rank")
    return found[name]
