"""The steps of writing and verifying a checkpoint, each safe to be killed in."""

from __future__ import annotations

import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from pardemo.cluster.integrity import (
    FORMAT,
    MANIFEST,
    Damaged,
    Reader,
    check_files,
    digest,
    read_manifest,
    seal,
    sync_folder,
    write_synced,
)

T = TypeVar("T")
SPARE = 1.2  # free space wanted, as a multiple of what is about to be written
FULL = ("No space left on device", "unexpected pos", "file write failed", "Disk quota exceeded")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or does not fit; the older ones are as they were."""


class DiskFull(CheckpointError):
    """The disk has no room; says where, what is needed and what is free."""


class World:
    """The ranks that save together, in a gloo group of their own, so that a save in the background
    never mixes with training; one process alone where there is no group.

    A collective of theirs has the limit of the default group: torch gives a new group 30 minutes,
    for which the others would wait when one rank hangs in a save.
    """

    def __init__(self) -> None:
        self.group: Any = None
        self.rank, self.size = 0, 1
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo", timeout=_limit())
            self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make()` gives on rank 0, on every rank; its error too."""
        return self.gathered(make if self.rank == 0 else lambda: None)[0]  # type: ignore[return-value]

    def together(self, do: Callable[[], object]) -> None:
        """`do()` on rank 0 while the others wait; its error is raised everywhere."""
        self.from_first(do)

    def gathered(self, make: Callable[[], T]) -> list[T]:
        """`make()` of every rank, on every rank; the first rank's error is raised on all."""
        try:
            mine: Any = (make(), None)
        except Exception as error:
            if self.group is None:
                raise
            mine = (None, _portable(error))
        everyone: list[Any] = [mine]
        if self.group is not None:
            everyone = [None] * self.size
            dist.all_gather_object(everyone, mine, group=self.group)  # moves a few kB per rank
        for _, failed in everyone:
            if failed is not None:
                raise failed
        return [value for value, _ in everyone]


def _limit() -> timedelta:
    """The limit of a collective in the default group; torch has no public name for it."""
    kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
    group = dist.group.WORLD
    assert group is not None
    return group._get_backend(torch.device(kind)).options._timeout


def _portable(error: Exception) -> Exception:
    """The error as one that travels: ours as they are, others as CheckpointError with the text."""
    known = isinstance(error, (CheckpointError, Damaged, OSError))
    return error if known else CheckpointError(f"{type(error).__name__}: {error}")


def copy_to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor, sharded ones shard by shard, that training will not change."""
    copied = tensor.detach().clone()
    return copied if copied.device.type == "cpu" else copied.cpu()


def plain_copy(extra: dict[str, Any]) -> dict[str, Any]:
    """A deep copy of plain values; TypeError for what JSON cannot hold."""
    return json.loads(json.dumps(extra))


def local_bytes(tensors: dict[str, Any]) -> int:
    """Bytes of this rank's shards."""
    return sum(
        getattr(tensor, "_local_tensor", tensor).numel() * tensor.element_size()
        for tensor in tensors.values()
    )


def prepare(folder: Path, temporary: Path) -> None:
    """Make the fresh folder, for this user alone; remove what killed saves left behind."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a symbolic link: give the folder itself")
    for stale in folder.glob("step-*.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary.mkdir(mode=0o700)
    sync_folder(folder)


def check_space(world: World, folder: Path, tensors: dict[str, Any]) -> None:
    """DiskFull on every rank unless all shards fit with room to spare."""
    need = sum(world.gathered(lambda: local_bytes(tensors)))

    def look() -> None:
        free = shutil.disk_usage(folder).free
        if free < need * SPARE:
            raise DiskFull(
                f"disk full at {folder}: the checkpoint needs {need * SPARE / 1e6:,.1f} MB and "
                f"{free / 1e6:,.1f} MB are free. Nothing was written; older checkpoints are good. "
                "Make room or keep fewer"
            )

    world.together(look)


def write_shards(world: World, temporary: Path, tensors: dict[str, Any]) -> None:
    """Every rank its shards, into the fresh folder, synced to the disk."""
    before = os.umask(0o077)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*assuming the intent is to.*")
            dcp.save(
                tensors, storage_writer=dcp.FileSystemWriter(temporary, overwrite=False),
                process_group=world.group, no_dist=world.size == 1,
            )  # fmt: skip
    finally:
        os.umask(before)


def write_manifest(world: World, temporary: Path, content: dict[str, Any]) -> None:
    """Every rank hashes a share of the files; rank 0 writes the list, then syncs the folder."""
    names = world.from_first(lambda: sorted(entry.name for entry in temporary.iterdir()))
    mine = names[world.rank :: world.size]
    shares = world.gathered(lambda: {name: digest(temporary / name) for name in mine})
    files = {name: value for share in shares for name, value in share.items()}
    manifest = {"format": FORMAT, **content, "world_size": world.size, "torch": torch.__version__}

    def write() -> None:
        text = seal({**manifest, "files": dict(sorted(files.items()))})
        write_synced(temporary / MANIFEST, text)
        sync_folder(temporary)

    world.together(write)


def publish(temporary: Path, final: Path) -> None:
    """One rename makes it real; an older checkpoint of the same step gives way, damaged or not."""
    if final.exists():
        os.rename(final, final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex}"))
    os.rename(temporary, final)
    sync_folder(final.parent)
    for old in final.parent.glob(f"{final.name}.tmp-*"):
        shutil.rmtree(old, ignore_errors=True)


def point_latest(folder: Path, name: str) -> None:
    """`latest` names the newest checkpoint for people and scripts; loading looks for itself."""
    temporary = folder / f"latest.{uuid.uuid4().hex}"
    write_synced(temporary, name + "\n")
    os.replace(temporary, folder / "latest")
    sync_folder(folder)


def translated(error: BaseException, folder: Path, tensors: dict[str, Any]) -> BaseException:
    """torch says "unexpected pos" for a full disk; say what it means. Other errors stay."""
    text = f"{error} {error.__cause__ or ''}"
    if not any(words in text for words in FULL):
        return as_error(error)
    free = shutil.disk_usage(folder).free
    return DiskFull(
        f"disk full at {folder} while writing this rank's {local_bytes(tensors) / 1e6:,.1f} MB "
        f"({free / 1e6:,.1f} MB are free now). The partial checkpoint was removed; older ones are "
        "good. Make room or keep fewer"
    )


def as_error(error: BaseException) -> BaseException:
    """torch's CheckpointException is no Exception, so `except Exception` misses it: make it one."""
    if isinstance(error, CheckpointException):
        causes = [f"rank {rank}: {why}" for rank, (why, _) in sorted(error.failures.items())]
        return CheckpointError("; ".join(causes))
    return error


def verify(world: World, path: Path) -> tuple[str | None, dict[str, Any] | None]:
    """(None, manifest) when every file is as written, else (what is wrong, None); on every rank.

    Each rank hashes a share of the files.
    """
    try:
        manifest = world.from_first(lambda: read_manifest(path))
        mine = sorted(manifest["files"])[world.rank :: world.size]
        world.gathered(lambda: check_files(path, manifest, mine))
        world.together(lambda: Reader(path).read_metadata())
    except (Damaged, OSError) as error:
        return str(error), None
    return None, manifest


def check_fit(path: Path, metadata: Metadata, tensors: dict[str, Any]) -> None:
    """CheckpointError that names the first tensors that are missing or have another shape."""
    saved = metadata.state_dict_metadata
    missing = sorted(set(tensors) - set(saved))
    if missing:
        raise CheckpointError(f"{path.name} does not fit this model: it has no {_few(missing)}")
    unused = sorted(key for key in saved if key not in tensors)
    if unused:
        raise CheckpointError(f"{path.name} does not fit this model: which has no {_few(unused)}")
    for key, tensor in tensors.items():
        entry = saved[key]
        if isinstance(entry, TensorStorageMetadata) and entry.size != tensor.shape:
            raise CheckpointError(
                f"{path.name} does not fit this model: {key} is {tuple(entry.size)} there and "
                f"{tuple(tensor.shape)} here"
            )


def _few(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
