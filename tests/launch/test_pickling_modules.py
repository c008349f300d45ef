"""Functions travel whatever names they use."""

from __future__ import annotations

import torch.distributed as dist

from pardemo.launch.pickling import pack, unpack

config = {"width": 3}


def test_a_function_may_use_dist_and_a_variable_called_config() -> None:
    def width() -> tuple[bool, int]:
        return dist.is_initialized(), config["width"]

    parts, _ = pack(width, "a function")
    assert unpack(parts)() == (False, 3)
