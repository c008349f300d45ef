"""Calls from the rank that drives a world to the ranks that serve it, through their store.

The driver writes numbered messages; every rank of the session answers each with what became of it
there. A session has a process group of its own, so that it may take fewer ranks than the world
has, and a new one may follow after a failure.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from itertools import count
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from pardemo.launch import inside, pickling
from pardemo.launch.failure import Outcome, RankFailed, RankTimeout, culprit
from pardemo.launch.rank import _link, seed_all
from pardemo.launch.session import Setup
from pardemo.parameters import Refused

PIECE = 4 << 20  # bytes; torch 2.13's store takes no value above 8 MiB
FOREVER_S = 7 * 86_400.0
EXTRA_S = 30.0  # beyond a call's own limit: torch's timeout comes first, and says more


def put(store: Any, key: str, meta: Any, parts: Iterable[Any]) -> None:
    """Store plain `meta` and binary `parts` under a key, the last of it last."""
    sizes = []
    for number, part in enumerate(parts):
        view = memoryview(part).cast("B")
        sizes.append(-(-len(view) // PIECE))
        for piece in range(sizes[-1]):
            chunk = bytes(view[piece * PIECE : (piece + 1) * PIECE])
            store.set(f"{key}/{number}/{piece}", chunk)
    store.set(key, json.dumps({"meta": meta, "sizes": sizes}))


def take(store: Any, key: str, readers: int = 1) -> tuple[Any, list[bytearray]]:
    """What was put; the last of `readers` removes it."""
    told = json.loads(store.get(key))
    names = [[f"{key}/{n}/{i}" for i in range(size)] for n, size in enumerate(told["sizes"])]
    parts = [bytearray().join(store.get(name) for name in row) for row in names]
    if readers == 1 or store.add(f"{key}/readers", 1) == readers:
        for name in [key, *(name for row in names for name in row)]:
            store.delete_key(name)
    return told["meta"], parts


class Rank:
    """One rank's part: it joins and leaves process groups, and runs what it is told.

    Functions have a `__main__` of their own here. On rank 0 that keeps what a rank defines apart
    from what the program defines, which would be sent to the other ranks with its functions.
    """

    def __init__(self, store: Any, rank: int) -> None:
        self.store, self.rank = store, rank
        self.before: dict[str, str | None] = {}
        program = sys.modules["__main__"]
        self.main = inside.main_module()
        sys.modules["__main__"] = program

    def open(self, number: int, told: Mapping[str, Any]) -> None:
        """Join the process group of a new session."""
        self.leave()
        wanted = {**told["env"], **({"TORCH_DISTRIBUTED_DEBUG": "DETAIL"} if told["debug"] else {})}
        self.before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        dist.set_debug_level_from_env()
        torch.set_num_threads(told["threads"])
        seed_all(told["seed"], self.rank)
        if told["backend"] != "none":
            dist.init_process_group(
                told["backend"], store=dist.PrefixStore(f"group/{number}", self.store),
                rank=self.rank, world_size=told["nprocs"],
                timeout=timedelta(seconds=told["timeout"] or FOREVER_S),
            )  # fmt: skip

    def leave(self) -> None:
        """Leave the process group, so that ranks which wait in it find out."""
        gc.collect()
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):  # a broken group may not end cleanly
                dist.destroy_process_group()
        for name, value in self.before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        self.before = {}

    def answer(self, number: int, parts: Sequence[Any]) -> Outcome:
        """Do what a message says, and say what became of it."""
        program, sys.modules["__main__"] = sys.modules["__main__"], self.main
        try:
            return self._answer(number, parts)
        finally:
            sys.modules["__main__"] = program

    def _answer(self, number: int, parts: Sequence[Any]) -> Outcome:
        outcome = Outcome(self.rank, "returned")
        try:
            value = self._do(number, *pickling.unpack(parts))
            outcome.at = time.monotonic()
            what = f"the value rank {self.rank} returned (a {type(value).__name__})"
            packed, _ = pickling.pack(value, what, detach=True)
            outcome.body = [bytearray(part) for part in packed]
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit is a failure too
            outcome.kind, outcome.at = "raised", outcome.at or time.monotonic()
            outcome.meta = {
                "error": type(error).__name__, "message": inside.safe_text(error),
                "chain": [_link(link) for link in inside.chain(error)],
                "traceback": inside.format_error(error),
                "collectives": inside.collectives(),
            }  # fmt: skip
        if outcome.failed:
            self.leave()
        return outcome

    def _do(self, number: int, kind: str, *told: Any) -> Any:
        if kind == "open":
            return self.open(number, told[0])
        if kind == "close":
            return self.leave()
        fn, args, kwargs = told[0], told[1], told[2]
        return fn(*args, **kwargs)


def serve(store: Any, rank: int, world_size: int) -> None:
    """Answer the driver's messages until it says that it is the end."""
    calls, mine = store.clone(), Rank(store, rank)  # waiting blocks a store for other threads
    for number in count(1):
        key = f"message/{number}"
        calls.wait([key], timedelta(seconds=FOREVER_S))
        meta, parts = take(calls, key, world_size - 1)
        if meta["end"]:
            calls.set(f"left/{rank}", "")
            return
        if rank in meta["ranks"]:
            pickling.add_sources(meta["sources"])
            outcome = mine.answer(number, parts)
            told = {"kind": outcome.kind, "at": outcome.at, "meta": outcome.meta}
            put(calls, f"answer/{number}/{rank}", told, outcome.body or [])


class Driver:
    """Rank 0's side: opens sessions of the world's first ranks, one at a time."""

    def __init__(self, store: Any, world_size: int) -> None:
        self.store, self.world_size = store.clone(), world_size
        self.rank = Rank(store, 0)
        self.sent = 0
        self.current: Session | None = None

    def session(self, setup: Setup, echo: bool = True) -> Session:
        """A session of `setup.nprocs` ranks, for `Ranks`."""
        if setup.nprocs > self.world_size:
            raise Refused(
                f"{setup.nprocs} ranks are wanted, this world has {self.world_size}: start more "
                "with torchrun, or ask for fewer"
            )
        if self.current is not None and self.current.alive:
            raise Refused("under torchrun one group of ranks is open at a time: close it first")
        self.current = Session(self, setup)
        return self.current

    def tell(self, message: Any, ranks: Iterable[int]) -> tuple[int, list[bytearray]]:
        """Send a message to some ranks; returns its number, and rank 0's own copy of it."""
        parts, sources = pickling.pack(message, "the call")
        self.sent += 1
        meta = {"end": message == "end", "ranks": list(ranks), "sources": sources}
        put(self.store, f"message/{self.sent}", meta, parts)
        return self.sent, [bytearray(part) for part in parts]

    def end(self) -> None:
        """Let the other ranks go, and wait until they have: the store may live in this process."""
        if self.current is not None:
            self.current.close()
        self.tell("end", [])
        if left := [f"left/{rank}" for rank in range(1, self.world_size)]:
            with contextlib.suppress(dist.DistError):  # torchrun tells of those that died
                self.store.wait(left, timedelta(seconds=EXTRA_S))


class Session:
    """The first `setup.nprocs` ranks of a world as one group; used as launch's own sessions are."""

    group = None  # none of its processes are ours

    def __init__(self, driver: Driver, setup: Setup) -> None:
        self.driver, self.setup = driver, setup
        self.output = Unheard(setup.nprocs)
        self.alive = True
        names = ("nprocs", "backend", "timeout", "threads", "seed", "debug", "env")
        self._do(("open", {name: getattr(setup, name) for name in names}), None)

    def call(
        self, fn: Any, args: Any, kwargs: Any, last: bool, only: list[int] | None = None
    ) -> dict[int, Any]:
        """Run `fn` on the ranks; their values by rank. RankFailed when one fails; it is over then.

        A rank that does not answer in time is a RankTimeout; the program must be started again.
        """
        return self._do(("call", fn, args, kwargs), only)

    def close(self) -> None:
        """Leave the process group, on every rank."""
        if self.alive:
            with contextlib.suppress(RankFailed):
                self._do(("close",), None)
            self.alive = False

    def _do(self, message: tuple[Any, ...], only: list[int] | None) -> dict[int, Any]:
        ranks = list(range(self.setup.nprocs)) if only is None else only
        number, copied = self.driver.tell(message, ranks)
        outcomes = {0: self.driver.rank.answer(number, copied)} if 0 in ranks else {}
        limit_s = (self.setup.timeout or FOREVER_S) + EXTRA_S
        outcomes |= self._answers(number, [rank for rank in ranks if rank], limit_s)
        if any(outcome.kind != "returned" for outcome in outcomes.values()):
            self._fail(outcomes)
        return {rank: pickling.unpack(outcomes[rank].body or []) for rank in ranks}

    def _answers(self, number: int, ranks: Iterable[int], limit_s: float) -> dict[int, Outcome]:
        """What became of a message on other ranks; "waiting" where there is no answer."""
        until, found = time.monotonic() + limit_s, {}
        for rank in ranks:
            key = f"answer/{number}/{rank}"
            left_s = max(1.0, until - time.monotonic())
            try:
                self.driver.store.wait([key], timedelta(seconds=left_s))
            except dist.DistStoreError:
                found[rank] = Outcome(rank)
                continue
            told, parts = take(self.driver.store, key)
            found[rank] = Outcome(rank, told["kind"], told["at"], told["meta"], parts)
        return found

    def _fail(self, outcomes: Mapping[int, Outcome]) -> NoReturn:
        self.alive = False
        rank, headline = culprit(outcomes)
        told = {r: o.meta.get("traceback", o.kind) for r, o in outcomes.items()}
        silent = [r for r, o in outcomes.items() if o.kind == "waiting"]
        if silent:
            headline += f"; no answer from ranks {silent}: this world is over, start it again"
        raise (RankTimeout if silent else RankFailed)(f"{headline}\n\n{told[rank]}", rank, told)


class Unheard:
    """In place of ranks' output: in a world they print to torchrun's terminal."""

    def __init__(self, size: int) -> None:
        self.size = size

    def clear(self) -> None:
        """Nothing was kept."""

    def text(self) -> tuple[str, ...]:
        """An empty text per rank."""
        return ("",) * self.size
