"""What is known about ranks from outside: process, device, memory."""

from __future__ import annotations

from typing import Any

import psutil

from pardemo.launch.group import Group
from pardemo.launch.session import Setup


def status(group: Group | None, setup: Setup) -> list[dict[str, Any]]:
    """One row per rank; `memory_bytes` is what no other process shares (USS), 0 when it is gone."""
    rows = []
    for rank in range(setup.nprocs):
        pid = group.pids.get(rank) if group is not None else None
        rows.append(
            {
                "rank": rank,
                "pid": pid,
                "device": f"cuda:{rank}" if "nccl" in setup.backend else "cpu",
                "memory_bytes": _memory(pid),
                "alive": group is not None and pid is not None and rank not in group.dead,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'rank':>4}  {'pid':>8}  {'device':<8}  {'memory':>10}  alive"]
    for row in rows:
        memory = f"{row['memory_bytes'] / 1e6:.0f} MB"
        alive = "yes" if row["alive"] else "no"
        lines.append(
            f"{row['rank']:>4}  {row['pid'] or '-':>8}  {row['device']:<8}  {memory:>10}  {alive}"
        )
    return "\n".join(lines)


def _memory(pid: int | None) -> int:
    try:
        return int(psutil.Process(pid).memory_full_info().uss) if pid else 0
    except psutil.Error:
        return 0
