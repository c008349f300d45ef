"""Is this checkpoint whole, and did this user write it? Asked before anything in it is opened.

A distributed checkpoint's `.metadata` is a pickle, and torch reads it with plain `pickle.load`: a
planted one is code. Its data files carry no checksum that torch verifies: flipped bits load as
wrong weights. So a folder is trusted only when this user alone can write it, every file has the
size and SHA-256 that the manifest says, the manifest its own, and the pickle names nothing but the
classes a checkpoint is made of.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import stat
from enum import EnumType
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import StorageMeta

MANIFEST = "MANIFEST.json"
FORMAT = 2  # 1 had no checksum of the manifest itself
SEALED = re.compile(r'(.*),\n "sha256": "([0-9a-f]{64})"\n\}\n', re.DOTALL)
_CHECKPOINT = "torch.distributed.checkpoint"
ALLOWED = {
    ("pathlib", "PosixPath"), ("torch", "Size"), ("torch.serialization", "_get_layout"),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    *(
        (f"{_CHECKPOINT}.metadata", name)
        for name in (
            "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
            "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    ),
}  # fmt: skip


class Damaged(RuntimeError):
    """A checkpoint that is not as it was written, or not this user's; names the file."""


def digest(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": sha256}


def sync_folder(folder: Path) -> None:
    """Make what was created or renamed in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, text: str) -> None:
    """Write a new file of this user alone, down to the disk; it must not exist yet."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def check_owner(path: Path) -> None:
    """Damaged unless `path` is this user's own, writable by nobody else, and not a link."""
    seen = path.lstat()
    if stat.S_ISLNK(seen.st_mode):
        raise Damaged(f"{path} is a symbolic link: a checkpoint holds its own files")
    if seen.st_uid != os.geteuid():
        raise Damaged(f"{path} belongs to user {seen.st_uid}: you did not write it")
    if seen.st_mode & 0o022:
        raise Damaged(f"{path} is writable by others (mode {seen.st_mode & 0o777:o}): chmod go-w")


def seal(content: dict[str, Any]) -> str:
    """The text of a manifest: JSON whose last entry is the SHA-256 of all that stands before."""
    text = json.dumps(content, indent=1).removesuffix("\n}")
    return f'{text},\n "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder whose owner and list of files are right."""
    check_owner(folder)
    path = folder / MANIFEST
    if not path.exists():
        raise Damaged(f"{path} is missing: the save was not finished")
    check_owner(path)
    try:
        text = path.read_bytes().decode()
        manifest = json.loads(text)
        files, version = manifest["files"], manifest["format"]
        whole = all({"bytes", "sha256"} <= set(entry) for entry in files.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = " ".join(str(error).split())[:200]
        raise Damaged(f"{path} is not a manifest ({said})") from error
    if version != FORMAT:
        said = repr(version)[:80]
        raise Damaged(f"{path} has format {said}; this version of pardemo reads {FORMAT}")
    sealed = SEALED.fullmatch(text)
    if sealed is None or hashlib.sha256(sealed[1].encode()).hexdigest() != sealed[2]:
        raise Damaged(f"{path} has other contents than were written (SHA-256 differs)")
    if not whole:
        raise Damaged(f"{path} is not a manifest (a file without its size and SHA-256)")
    there = {entry.name for entry in folder.iterdir()} - {MANIFEST}
    if extra := sorted(there - set(files)):
        raise Damaged(f"{folder / extra[0]} is not in the manifest: it was added later")
    if missing := sorted(set(files) - there):
        raise Damaged(f"{folder / missing[0]} is missing")
    return manifest


def check_files(folder: Path, manifest: dict[str, Any], names: list[str]) -> None:
    """Damaged unless these files are as the manifest says."""
    for path in (folder / name for name in names):
        check_owner(path)
        found, expected = digest(path), manifest["files"][path.name]
        if found["bytes"] != expected["bytes"]:
            raise Damaged(f"{path} has {found['bytes']:,} bytes instead of {expected['bytes']:,}")
        if found["sha256"] != expected["sha256"]:
            raise Damaged(f"{path} has other contents than were written (SHA-256 differs)")


def _member(owner: Any, name: str) -> Any:
    """A member of an Enum: before Python 3.11.4 pickle writes one as getattr(its class, name)."""
    if not (isinstance(owner, EnumType) and name in owner.__members__):
        raise Damaged(
            f"its .metadata takes {name!r} of {owner!r}, which no checkpoint needs: refused"
        )
    return owner[name]


class _Unpickler(pickle.Unpickler):
    """Reads `.metadata`, and nothing that is not made of a checkpoint's own classes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        plain = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not plain and (module, name) not in ALLOWED:
            raise Damaged(
                f"its .metadata names {module}.{name}, which no checkpoint needs: refused"
            )
        return super().find_class(module, name)


class Reader(FileSystemReader):
    """torch's reader of a checkpoint folder, with a `.metadata` that cannot run anything."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The checkpoint's contents list; Damaged for a pickle that names anything else."""
        folder = Path(self.path)
        with (folder / ".metadata").open("rb") as file:
            try:
                metadata = _Unpickler(file).load()
            except Damaged as error:
                raise Damaged(f"{folder}: {error}") from None
            except Exception as error:
                raise Damaged(f"{folder / '.metadata'} cannot be read ({error})") from error
        if not isinstance(metadata, Metadata):
            raise Damaged(f"{folder / '.metadata'} is not a checkpoint's metadata")
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise Damaged(f"{folder}: its .metadata points outside, at {info.relative_path!r}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class TensorsOnly(DefaultLoadPlanner):
    """A load planner without objects: torch would unpickle them without restraint."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        """Never called for a checkpoint of ours: it holds tensors, and JSON in the manifest."""
        raise Damaged(f"{read_item.dest_index.fqn} is a pickled object, not a tensor: refused")
