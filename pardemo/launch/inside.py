"""Where a rank is: its Python stack, and the collectives that torch's flight recorder has of it."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
import types
from typing import Any

import torch
import torch.distributed as dist

_HERE = os.path.dirname(__file__)
_LONGEST = 20_000  # characters of a message or a traceback that are worth sending
_MACHINERY = (_HERE, os.path.dirname(threading.__file__) + "/multiprocessing", "<frozen")


def where(thread_id: int) -> dict[str, Any]:
    """State of the thread that runs the learner's function, asked from another thread.

    `stack`: its frames as text, without this package's; `line`: the innermost frame that is
    not torch's; `inside`: the torch function it is in; `collectives`: see below.
    """
    frame = sys._current_frames().get(thread_id)
    frames = learner_frames(traceback.extract_stack(frame)) if frame else traceback.StackSummary()
    own = [f for f in frames if "/torch/" not in f.filename]
    called = [f.name for f in frames if "/torch/distributed/" in f.filename]
    return {
        "stack": "".join(frames.format()),
        "line": f'File "{own[-1].filename}", line {own[-1].lineno}' if own else "",
        "inside": called[0] if called else "",
        "collectives": collectives(),
    }


def learner_frames(frames: traceback.StackSummary) -> traceback.StackSummary:
    """The frames below this package's and multiprocessing's, without torch's logging wrapper."""
    kept = [
        f
        for f in frames
        if not f.filename.startswith(_MACHINERY) and not f.filename.endswith("c10d_logger.py")
    ]
    return traceback.StackSummary.from_list(kept)


def format_error(error: BaseException) -> str:
    """The traceback as Python prints it, causes included, without this package's frames."""
    report = traceback.TracebackException.from_exception(error)
    seen: list[Any] = [report]
    while seen:
        part = seen.pop()
        part.stack = learner_frames(part.stack)
        seen += [cause for cause in (part.__cause__, part.__context__) if cause]
    return _cut("".join(report.format()))


def _cut(text: str) -> str:
    """A text without its middle, where it is longer than anybody reads."""
    if len(text) <= _LONGEST:
        return text
    left_out = f"\n... ({len(text) - _LONGEST} characters left out) ...\n"
    return text[: _LONGEST // 2] + left_out + text[-_LONGEST // 2 :]


def safe_text(error: BaseException) -> str:
    """str(error) within limits, for errors whose own __str__ fails as well."""
    try:
        return _cut(str(error))
    except BaseException as second:  # the learner's code; what it raised is all there is to say
        return f"<its message cannot be shown: {type(second).__name__}>"


def raised_in_torch(error: BaseException) -> bool:
    """Whether torch raised it, and not the learner's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and "/torch/" in frames[-1].filename


def chain(error: BaseException) -> list[BaseException]:
    """The error and everything it came from."""
    found: list[BaseException] = []
    next_one: BaseException | None = error
    while next_one is not None and not any(next_one is one for one in found):
        found.append(next_one)
        next_one = next_one.__cause__ or next_one.__context__
    return found


def collectives() -> dict[str, dict[str, Any]]:
    """By process group: its ranks and this rank's newest collective there.

    `seq` counts the group's collectives from 1, `retired` says whether it has completed.
    Point-to-point calls are not recorded by gloo; the stack shows them.
    """
    if not dist.is_available() or not dist.is_initialized():
        return {}
    recorder: Any = torch._C._distributed_c10d  # private, and the only way to the recorder
    dump = json.loads(recorder._dump_fr_trace_json(includeCollectives=True, onlyActive=False))
    members = {
        group.group_name: dist.get_process_group_ranks(group)
        for group in list(dist.distributed_c10d._world.pg_map)
        if isinstance(group, dist.ProcessGroup)
    }
    found: dict[str, dict[str, Any]] = {}
    for entry in dump.get("entries", []):
        if entry["is_p2p"]:
            continue
        name = entry["process_group"][0]
        found[name] = {
            "name": entry["profiling_name"].split(":")[-1],
            "seq": entry["collective_seq_id"],
            "sizes": entry["input_sizes"],
            "dtypes": entry["input_dtypes"],
            "retired": bool(entry["retired"]),
            "ranks": members.get(name, []),
        }
    return found


def main_module() -> types.ModuleType:
    """A fresh `__main__`, the namespace that cells and pushed variables share in a rank."""
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = module
    return module
