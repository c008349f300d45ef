"""The barrier before every sample: it holds ranks back, costs no collective and leaves nothing."""

from __future__ import annotations

import ctypes
import resource
import time

import torch.distributed as dist

from pardemo.measure import count
from pardemo.measure.gate import Gate


def through():
    gate, late = Gate(dist.group.WORLD), []
    for turn in range(20):
        if dist.get_rank() == turn % 2:
            time.sleep(0.002)
        came = time.perf_counter()
        gate.wait()
        late.append((came, time.perf_counter()))
    shared, calls = gate.shared, count(gate.wait).calls()
    gate.close()
    return late, shared, calls


def test_nobody_passes_before_the_last_has_come(ranks2):
    first, second = ranks2(through)
    assert first[1:] == second[1:] == (True, 0)
    for (came0, left0), (came1, left1) in zip(first[0], second[0], strict=True):
        assert min(left0, left1) >= max(came0, came1)


def mapped():
    gate = Gate(dist.group.WORLD)
    with open("/proc/self/maps") as maps:
        lines = [line.split(maxsplit=5)[5].strip() for line in maps if "pardemo-gate-" in line]
    gate.close()
    return lines


def test_its_memory_never_has_a_name_that_a_killed_rank_could_leave(ranks2):
    for lines in ranks2(mapped):
        (line,) = lines
        assert line.startswith("/memfd:pardemo-gate-")


def slack():
    def now() -> int:
        return ctypes.CDLL(None).prctl(30, 0, 0, 0, 0)  # PR_GET_TIMERSLACK

    before, gate = now(), Gate(dist.group.WORLD)
    inside = now()
    gate.close()
    return before, inside, now()


def test_naps_end_on_time_while_it_is_open(ranks2):
    for before, inside, after in ranks2(slack):
        assert (inside, after) == (1, before)


def naps(cores):
    gate = Gate(dist.group.WORLD, cores)
    gate.wait()
    before = resource.getrusage(resource.RUSAGE_THREAD)
    for _ in range(10):
        if dist.get_rank() == 0:
            time.sleep(0.003)
        gate.wait()
    after = resource.getrusage(resource.RUSAGE_THREAD)
    gate.close()
    return after.ru_nvcsw - before.ru_nvcsw


def test_a_rank_that_waits_sleeps_where_ranks_share_cores(ranks2):
    asleep = ranks2(naps, 1)[1]
    assert asleep >= 10  # gave its core up for the other's 3 ms, each time
    assert ranks2(naps, 2)[1] < asleep  # yields, and stays awake


def apart():
    gate = Gate(dist.group.WORLD)
    gate.close()  # as where one host's memory is not the other's
    return count(gate.wait).calls(kind="barrier")


def test_without_shared_memory_it_is_the_groups_barrier(ranks2):
    assert list(ranks2(apart)) == [1, 1]


def test_a_single_rank_has_nobody_to_wait_for():
    Gate(None).wait()
