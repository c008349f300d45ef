"""What goes between the kernel and its ranks: functions of a cell by value, tensors as bytes.

cloudpickle sends what `__main__` defines by value, so that nothing has to be importable. Tensors
travel as pickle-5 buffers on the CPU: never through shared memory, whose segments die with the
process that made them. The source lines of every function sent go with it, because a rank cannot
read a cell from disk and a traceback without its line teaches nothing.
"""

from __future__ import annotations

import functools
import importlib
import io
import linecache
import os
import pickle
import sys
import types
from collections.abc import Sequence
from typing import Any

import cloudpickle
import torch

from pardemo.launch.wire import Part

WARN_BYTES = 20_000_000


class Unsendable(TypeError):
    """A value that cannot be sent to another process; the message names it."""


class _Pickler(cloudpickle.Pickler):
    """cloudpickle with tensors out of band; remembers which functions it met."""

    def __init__(self, file: io.BytesIO, buffers: list[pickle.PickleBuffer], detach: bool) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffers.append)
        self.detach = detach
        self.functions: list[types.FunctionType] = []
        self.by_value: list[types.ModuleType] = []

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor):
            reduced = _reduce_tensor(obj, self.detach)
            if reduced is not None:
                return reduced
        if isinstance(obj, types.ModuleType) and type(obj) is not types.ModuleType:
            # torch.distributed.config is one; cloudpickle adds it to every function that uses
            # `dist` and something called `config`, and then cannot send it
            return importlib.import_module, (obj.__name__,)
        if isinstance(obj, types.FunctionType):
            self.functions.append(obj)
        if isinstance(obj, types.FunctionType | type):
            self._send_unimportable(sys.modules.get(obj.__module__))
        return super().reducer_override(obj)

    def _send_unimportable(self, module: types.ModuleType | None) -> None:
        """Send by value what is in a module that a rank could not import, like a test's."""
        name = module.__name__ if module is not None else "__main__"
        if module is None or name == "__main__" or _importable(name.partition(".")[0]):
            return
        if name not in cloudpickle.list_registry_pickle_by_value():
            cloudpickle.register_pickle_by_value(module)
            self.by_value.append(module)

    def dump(self, obj: Any) -> None:
        """Pickle `obj`; leaves cloudpickle's registry as it was."""
        try:
            super().dump(obj)
        finally:
            for module in self.by_value:
                cloudpickle.unregister_pickle_by_value(module)
            self.by_value.clear()


@functools.cache
def _importable(name: str) -> bool:
    """Whether a fresh process with this sys.path would find a top-level module."""
    if name in sys.builtin_module_names:
        return True
    finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
    return any(finder.find_spec(name, None) is not None for finder in finders)


def pack(value: Any, what: str, detach: bool = False) -> tuple[list[Part], dict[str, list[str]]]:
    """`value` as parts for the wire, and the source lines of the functions in it by file name.

    `detach` drops requires_grad from tensors (values on their way back). `what` names the value
    in the Unsendable that is raised when some part of it cannot be pickled.
    """
    file = io.BytesIO()
    buffers: list[pickle.PickleBuffer] = []
    pickler = _Pickler(file, buffers, detach)
    try:
        pickler.dump(value)
    except Exception as error:
        culprit = _find_unsendable(value)
        raise Unsendable(f"{what} cannot be sent: {culprit or ''}{error}") from error
    return [file.getbuffer(), *(buffer.raw() for buffer in buffers)], _sources(pickler.functions)


def unpack(parts: Sequence[Part]) -> Any:
    """The value that `pack` was given; functions of `__main__` share this process's `__main__`."""
    return _Unpickler(io.BytesIO(parts[0]), buffers=parts[1:]).load()


class _Unpickler(pickle.Unpickler):
    """Gives functions of the kernel's `__main__` the globals of this process's `__main__`.

    cloudpickle would give every function its own copy of the globals it uses, and a name that one
    call defines would be unknown to the next.
    """

    def find_class(self, module: str, name: str) -> Any:
        if name == "_make_function" and module.startswith("cloudpickle"):
            return _make_function
        return super().find_class(module, name)


def _make_function(
    code: types.CodeType,
    base_globals: dict[str, Any],
    name: str,
    argdefs: Any,
    closure: Any,
) -> types.FunctionType:
    if base_globals.get("__name__") == "__main__":
        base_globals = vars(sys.modules["__main__"])
    base_globals.setdefault("__builtins__", __builtins__)
    return types.FunctionType(code, base_globals, name, argdefs, closure)


def _reduce_tensor(tensor: torch.Tensor, detach: bool) -> Any:
    if type(tensor).__name__ == "DTensor":
        raise Unsendable("a DTensor belongs to its ranks: send .full_tensor() or .to_local()")
    if type(tensor) is not torch.Tensor or tensor.layout != torch.strided:
        return None
    if tensor.is_quantized or tensor.device.type == "meta":
        return None
    data = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    raw = data.reshape(-1).view(torch.uint8) if data.numel() else torch.empty(0, dtype=torch.uint8)
    grad = tensor.requires_grad and not detach
    storage: Any = raw.numpy()
    return _rebuild_tensor, (pickle.PickleBuffer(storage), data.dtype, tuple(data.shape), grad)


def _rebuild_tensor(
    buffer: Any, dtype: torch.dtype, shape: tuple[int, ...], grad: bool
) -> torch.Tensor:
    if not memoryview(buffer).nbytes:
        return torch.empty(shape, dtype=dtype, requires_grad=grad)
    tensor = torch.frombuffer(buffer, dtype=dtype).reshape(shape)
    return tensor.requires_grad_(grad)


def _sources(functions: list[types.FunctionType]) -> dict[str, list[str]]:
    """Lines of the files that only this process can read: cells, exec'd text."""
    found = {}
    for function in functions:
        name = function.__code__.co_filename
        lines = linecache.getlines(name, function.__globals__)
        if lines and not os.path.exists(name):
            found[name] = lines
    return found


def add_sources(sources: dict[str, list[str]]) -> None:
    """Make `linecache` and so every traceback know these lines."""
    for name, lines in sources.items():
        linecache.cache[name] = (sum(map(len, lines)), None, lines, name)


def captured(function: Any) -> dict[str, Any]:
    """The globals and closure variables that a function drags along, by name."""
    function = getattr(function, "__func__", function)
    if not isinstance(function, types.FunctionType):
        return {}
    names = _names(function.__code__)
    found = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # a closure variable that is not bound yet
            continue
    return found


def _names(code: types.CodeType) -> set[str]:
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found


def _flat(value: Any) -> list[tuple[str, Any]]:
    """Named pieces of a call `(fn, args, kwargs)`: its arguments and what its function captures."""
    if not (isinstance(value, tuple) and len(value) == 3 and callable(value[0])):
        return []
    function, args, kwargs = value
    pieces = [(f"argument {i}", arg) for i, arg in enumerate(args)]
    pieces += [(f"argument {name!r}", arg) for name, arg in kwargs.items()]
    return pieces + [
        (f"{name!r}, which the function uses", v) for name, v in captured(function).items()
    ]


def _size(value: Any) -> int:
    """Bytes of `value` once pickled; -1 when it cannot be."""
    file = io.BytesIO()
    buffers: list[pickle.PickleBuffer] = []
    try:
        _Pickler(file, buffers, detach=False).dump(value)
    except Exception:  # whatever a __reduce__ raises, it means the same here
        return -1
    return file.tell() + sum(buffer.raw().nbytes for buffer in buffers)


def _find_unsendable(value: Any) -> str:
    for name, piece in _flat(value):
        if _size(piece) < 0:
            return f"{name} (a {type(piece).__name__}): "
    return ""


def size_warning(value: Any, parts: Sequence[Part]) -> str:
    """What to say when a call carries more than 20 MB: which names carry it; else empty."""
    total = sum(memoryview(part).nbytes for part in parts)
    if total <= WARN_BYTES:
        return ""
    sizes = sorted(((_size(piece), name) for name, piece in _flat(value)), reverse=True)
    named = [f"{name}: {size / 1e6:.0f} MB" for size, name in sizes if size > WARN_BYTES / 10]
    return (
        f"this call sends {total / 1e6:.0f} MB to every rank ({'; '.join(named) or 'in all'}). "
        "Load or create it inside the function, or push it once with Ranks.push"
    )
