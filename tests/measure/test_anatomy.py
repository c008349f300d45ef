"""Taking a step apart: synthetic samples with a known answer, and silence on two real ranks."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from pardemo.machine import machine
from pardemo.measure import Case, Comparison, Samples, Timing, count, decompose, quiet, statistics
from pardemo.measure.anatomy import take_apart
from pardemo.measure.replay import replay
from pardemo.measure.samples import Block
from pardemo.measure.traffic import Counting

MS = 1e-3
ROUNDS = 10


def comparison(real, worked, silenced, transfer):
    """Ten rounds of five iterations: per-rank milliseconds of wall time and of CPU time."""
    rng = np.random.default_rng(0)
    blocks = []
    parts = {
        "real": (real, worked),
        "silenced": (silenced, silenced),
        "transfer": (transfer, [0, 0]),
    }
    for name, (wall, cpu) in parts.items():
        for number in range(ROUNDS):
            shape = (len(wall), 5)
            jitter = np.exp(0.002 * rng.normal(size=(1, 5)))
            walls = np.tile(np.array(wall, float)[:, None], (1, 5)) * MS * jitter
            cpus = np.tile(np.array(cpu, float)[:, None], (1, 5)) * MS * jitter
            zeros = np.zeros(shape)
            blocks.append(
                Block(name, number, 0, "measure", zeros, walls, zeros, cpus, zeros.astype(int))
            )
    samples = Samples(tuple(blocks))
    timings = {n: Timing.of(samples.rounds(n), ranks=2, session="s", label=n) for n in parts}
    return Comparison(timings, samples, "synthetic", (), machine())


def test_a_balanced_step_with_exposed_transfer_adds_up():
    found = take_apart(comparison([100, 100], [80, 80], [80, 80], [30, 30]))
    assert found.compute_s == pytest.approx(80 * MS, rel=0.01)
    assert found.exposed_s == pytest.approx(20 * MS, rel=0.02)
    assert found.overlapped_s == pytest.approx(10 * MS, rel=0.05)
    assert found.idle_s == pytest.approx(0, abs=0.2 * MS)
    assert found.lost_s == pytest.approx(20 * MS, rel=0.05)
    assert found.lost_lo_s < 20 * MS < found.lost_hi_s
    assert found.adds_up
    assert found.missing == ""


def test_a_slow_rank_makes_the_other_idle_and_is_named():
    found = take_apart(comparison([100, 100], [50, 95], [50, 95], [5, 5]))
    assert found.shares[0].idle_s == pytest.approx(45 * MS, rel=0.02)
    assert found.shares[1].idle_s == pytest.approx(0, abs=0.2 * MS)
    assert found.exposed_s == pytest.approx(5 * MS, rel=0.05)
    assert found.last == (0.0, 1.0)
    assert found.adds_up
    assert "rank 1 is the last in 100% of the steps" in repr(found)


def test_a_bubble_is_idle_and_not_transfer():
    found = take_apart(comparison([100, 100], [48, 48], [48, 48], [2, 2]))
    assert found.exposed_s == pytest.approx(2 * MS, rel=0.05)
    assert found.idle_s == pytest.approx(50 * MS, rel=0.02)
    assert found.adds_up


def test_what_communication_takes_from_the_computation_beside_it_is_exposed_and_said():
    found = take_apart(comparison([100, 100], [95, 95], [80, 80], [10, 10]))
    assert found.exposed_s == pytest.approx(20 * MS, rel=0.02)
    assert found.contended_s == pytest.approx(15 * MS, rel=0.05)
    assert found.overlapped_s == pytest.approx(-10 * MS, rel=0.05)
    assert found.adds_up
    assert "more than it takes" in repr(found)
    assert "communication slows the computation beside it" in repr(found)


def test_the_parts_add_up_although_rounds_are_skewed():
    calm = comparison([100, 100], [70, 90], [68, 88], [8, 8])
    rng = np.random.default_rng(4)
    blocks = []
    for block in calm.samples.blocks:
        slow = 1 + rng.exponential(0.3)  # each variant of each round meets weather of its own
        walls, cpus = block.wall_s * slow, block.worked_s * slow
        blocks.append(replace(block, wall_s=walls, worked_s=cpus))
    samples = Samples(tuple(blocks))
    timings = {n: Timing.of(samples.rounds(n), ranks=2, session="s") for n in calm.timings}
    found = take_apart(replace(calm, timings=timings, samples=samples))
    total = found.compute_s + found.exposed_s + found.idle_s
    assert total + found.rest_s == pytest.approx(found.step_s)
    assert found.adds_up or "the typical round took" in found.missing


def test_the_typical_round_is_a_mean_of_rounds_that_few_bad_ones_cannot_move():
    rng = np.random.default_rng(2)
    rounds = np.array([10.0, 3.0, 2.0]) + 0.05 * rng.normal(size=(9, 3))
    rounds[:3] *= 40
    whole = np.column_stack([rounds, rounds.sum(axis=1)])
    centre = statistics.typical_weights(rounds) @ whole
    assert centre[:3].sum() == pytest.approx(centre[3])
    assert centre[:3] == pytest.approx([10.0, 3.0, 2.0], abs=0.2)


def test_the_shares_of_every_rank_add_up_to_the_step():
    found = take_apart(comparison([100, 98], [60, 90], [58, 88], [8, 8]))
    for share in found.shares:
        total = share.compute_s + share.exposed_s + share.idle_s + share.rest_s
        assert total == pytest.approx(found.step_s)


def silent_steps(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    if kind == "ddp":
        from pardemo.measure.quiet import hush

        net = DDP(net)
    else:
        fully_shard(net)
    x = torch.full((4, 8), 1.0 + dist.get_rank())

    def step():
        net.zero_grad()
        net(x).sum().backward()
        grad = next(net.parameters()).grad
        return getattr(grad, "_local_tensor", grad).clone()

    true = [step() for _ in range(3)][-1]
    if kind == "ddp":
        hush(net)
    with quiet():
        sent = count(step)
        wrong = step()
    dist.barrier()
    return true, wrong, sent.calls(), dist.group.WORLD._get_backend(torch.device("cpu")).name()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_silence_leaves_gradients_unsynchronised_and_ends_with_the_context(ranks2, kind):
    for true, wrong, _, backend in ranks2(silent_steps, kind):
        assert not torch.equal(true, wrong)
        assert backend == "gloo"


def broken_silence():
    x = torch.ones(3)
    try:
        with quiet():
            dist.all_reduce(x)  # moves nothing here
            raise KeyError("inside")
    except KeyError:
        before = x.clone()
    dist.all_reduce(x)  # moves 2(n-1)/n * 12 bytes
    return before, x


def test_silence_ends_when_the_step_fails(ranks2):
    for before, after in ranks2(broken_silence):
        assert before.tolist() == [1, 1, 1]
        assert after.tolist() == [2, 2, 2]


def replayed():
    me, parts = dist.get_rank(), [torch.empty(8), torch.empty(8)]

    def step():
        dist.all_reduce(torch.ones(8))  # moves 2(n-1)/n * 32 bytes
        dist.all_gather_single(torch.empty(16), torch.ones(8))  # moves (n-1)/n * 64 bytes
        dist.reduce_scatter_single(torch.empty(4), torch.ones(8))  # moves (n-1)/n * 32 bytes
        dist.all_to_all_single(torch.empty(8), torch.ones(8))  # moves (n-1)/n * 32 bytes
        dist.broadcast(torch.ones(8), 1)  # moves 32 bytes
        dist.reduce(torch.ones(8), 1)  # moves 32 bytes
        if me == 0:
            dist.send(parts[0], 1)  # moves 32 bytes
        else:
            dist.recv(parts[0], 0)  # moves 32 bytes

    with Counting() as counting:
        step()
    again = count(replay(counting.calls))
    return counting.traffic(), again


def test_communication_alone_sends_exactly_the_same_bytes(ranks2):
    for original, again in ranks2(replayed):
        assert again.sent_bytes() == original.sent_bytes()
        for flow in original.flows:
            assert again.payload_bytes(kind=flow.kind) == flow.payload_bytes


def lame(mesh):
    group = mesh.get_group()

    def step():
        time.sleep(0.05 * mesh.get_rank())
        dist.all_reduce(torch.ones(1), group=group)  # moves 4 bytes

    return step


def test_a_real_straggler_is_found_on_real_ranks(ranks2):
    found = decompose(
        Case(lame, ranks=2), ranks=ranks2, rounds=6, max_rounds=6, iterations=2, budget_s=5
    )
    assert found.last[1] == 1.0
    assert found.shares[0].idle_s > found.shares[1].idle_s
    assert found.timing.rounds == 6
