"""Sharded checkpoints that survive: written whole or not at all, verified before they are opened.

    checkpoints = Checkpoints("run7/checkpoints")
    at = checkpoints.load(model, optimizer)               # newest good one, or None
    checkpoints.save(step, model, optimizer, extra={"order": order.state()})

Every rank writes its own shards (torch.distributed.checkpoint) into a fresh folder; a manifest with
the SHA-256 of every file is added last, and one rename makes it `step-N`. A kill or a full disk at
any moment leaves the checkpoints before it as they were. All ranks call save and load together, and
see the same file system. One folder belongs to one run at a time.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import uuid
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from pardemo.cluster import storing, trees
from pardemo.cluster.integrity import Damaged, Reader, TensorsOnly
from pardemo.cluster.storing import CheckpointError

FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Loaded:
    """What was loaded: the step after which it was saved, its `extra`, and what was refused."""

    step: int
    extra: dict[str, Any]
    path: Path
    rejected: tuple[str, ...] = ()

    def __repr__(self) -> str:
        refused = f"; refused: {'; '.join(self.rejected)}" if self.rejected else ""
        return f"checkpoint of step {self.step:,} from {self.path.name}{refused}"


class Checkpoints:
    """The checkpoints of one run, in `folder`; the newest `keep` are kept.

    `notify` is called on rank 0 with the name of each phase as it begins: "data", "manifest",
    "rename", "latest", "done".
    """

    def __init__(
        self, folder: str | Path, keep: int = 2, notify: Callable[[str], None] | None = None
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.folder, self.keep, self.notify = Path(folder), keep, notify or (lambda phase: None)
        self.world = storing.World()
        self._pending: Future[Path] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def save(
        self, step: int, model: torch.nn.Module, optimizer: Any, extra: dict[str, Any] | None = None
    ) -> Path:
        """Save after `step` steps (collective); returns the folder. `extra` must be plain JSON.

        Raises DiskFull, and CheckpointError for what cannot be saved; older ones stay good.
        """
        self.wait()
        tensors, values = self._state(model, optimizer)
        return self._write(step, tensors, values, extra or {})

    def save_async(
        self, step: int, model: torch.nn.Module, optimizer: Any, extra: dict[str, Any] | None = None
    ) -> Future[Path]:
        """Copy the state now, write it while training goes on; `wait()` or the future has errors.

        The copy costs memory for one more set of this rank's shards. A second save waits for the
        first. The writing ranks talk in a process group of their own (gloo).
        """
        self.wait()
        tensors, values = self._state(model, optimizer)
        copied = {key: storing.copy_to_cpu(tensor) for key, tensor in tensors.items()}
        self._thread = self._thread or ThreadPoolExecutor(1, "pardemo-checkpoint")
        frozen = storing.plain_copy(extra or {})  # the caller may change its own while we write
        self._pending = self._thread.submit(self._write, step, copied, values, frozen)
        return self._pending

    def wait(self) -> None:
        """Wait for a save that is under way, and raise its error here."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def load(self, model: torch.nn.Module, optimizer: Any) -> Loaded | None:
        """Load the newest good checkpoint (collective); None where there has never been one.

        Works for another number of ranks, or another strategy, than saved it. A damaged one is
        named in a warning and the one before is taken. CheckpointError when none is good, or when
        it does not fit the model.
        """
        self.wait()
        rejected: list[str] = []
        for name in self.world.from_first(self.names):
            problem, manifest = storing.verify(self.world, self.folder / name)
            if problem is None:
                assert manifest is not None
                self._read(self.folder / name, manifest, model, optimizer)
                return Loaded(
                    manifest["step"], manifest["extra"], self.folder / name, tuple(rejected)
                )
            rejected.append(problem)
            if self.world.rank == 0:
                warnings.warn(f"checkpoint refused: {problem}; trying the one before", stacklevel=2)
        if rejected:
            raise CheckpointError(f"no checkpoint in {self.folder} is good: {'; '.join(rejected)}")
        return None

    def names(self) -> list[str]:
        """Finished checkpoints in the folder, newest first, good or not."""
        if not self.folder.is_dir():
            return []
        found = [entry.name for entry in self.folder.iterdir() if FOLDER.fullmatch(entry.name)]
        return sorted(found, key=lambda name: int(name[5:]), reverse=True)

    def _state(
        self, model: torch.nn.Module, optimizer: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """This rank's part of model and optimiser: tensors (sharded ones stay so), plain values."""
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise CheckpointError(
                f"the optimiser is a {type(optimizer).__name__}: a checkpoint takes one torch "
                "optimiser (one process, DDP, FSDP, hybrid sharding)"
            )
        weights, state = get_state_dict(model, optimizer)
        return trees.split({"model": weights, "optimizer": state})

    def _write(
        self, step: int, tensors: dict[str, Any], values: dict[str, Any], extra: dict[str, Any]
    ) -> Path:
        """Data, manifest, rename, latest: in this order, each on the disk before the next."""
        world, final = self.world, self.folder / f"step-{step:08d}"
        temporary = self.folder / world.from_first(lambda: f"{final.name}.tmp-{uuid.uuid4().hex}")
        content = {"step": step, "extra": storing.plain_copy(extra), "values": values}
        world.together(lambda: storing.prepare(self.folder, temporary))
        storing.check_space(world, self.folder, tensors)
        try:
            self._notify("data")
            storing.write_shards(world, temporary, tensors)
            self._notify("manifest")
            storing.write_manifest(world, temporary, content)
            self._notify("rename")
            world.together(lambda: storing.publish(temporary, final))
        except BaseException as error:
            if world.rank == 0:
                with contextlib.suppress(OSError):
                    shutil.rmtree(temporary)
            raise storing.translated(error, self.folder, tensors) from error
        self._notify("latest")
        world.together(lambda: storing.point_latest(self.folder, final.name))
        if world.rank == 0:
            older = [name for name in self.names() if int(name[5:]) <= step]
            for name in older[self.keep :]:
                shutil.rmtree(self.folder / name, ignore_errors=True)
        self._notify("done")
        return final

    def _notify(self, phase: str) -> None:
        if self.world.rank == 0:
            self.notify(phase)

    def _read(
        self, path: Path, manifest: dict[str, Any], model: torch.nn.Module, optimizer: Any
    ) -> None:
        """Load a verified checkpoint into model and optimiser, each rank its own part."""
        weights, state = get_state_dict(model, optimizer)
        whole = {"model": weights, "optimizer": state}
        tensors, _ = trees.split(whole)
        reader = Reader(path)
        storing.check_fit(path, reader.read_metadata(), tensors)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*assuming the intent is to.*")
                dcp.load(
                    tensors, storage_reader=reader, planner=TensorsOnly(),
                    process_group=self.world.group, no_dist=self.world.size == 1,
                )  # fmt: skip
        except CheckpointException as error:
            raise storing.as_error(error) from error
        whole = trees.fill(whole, tensors, manifest["values"])
        set_state_dict(
            model, optimizer,
            model_state_dict=whole["model"], optim_state_dict=whole["optimizer"],
        )  # fmt: skip


__all__ = ["CheckpointError", "Checkpoints", "Damaged", "Loaded"]
