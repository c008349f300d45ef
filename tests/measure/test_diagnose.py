"""diagnose(): causes planted in real training functions, and in made-up records."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Dataset

from pardemo import cluster
from pardemo.measure import diagnose, observe
from pardemo.measure.instruments import RankRecord, StepRecord, Wrapper
from pardemo.measure.observe import Run
from pardemo.measure.roads import Road
from pardemo.measure.traffic import Flow, Traffic

STEPS = 7


def train(net=None, steps=STEPS, microbatches=1, before=None, loader=None, **ddp):
    torch.manual_seed(0)
    net = net or nn.Linear(16, 4)
    width = next(net.parameters()).shape[1]
    model = DDP(net, **ddp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in loader or [torch.ones(8, width)] * steps:
        for _ in range(microbatches):
            if before is not None:
                before()
            model(batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return "done"


class Slow(Dataset):
    def __len__(self):
        return 4 * STEPS

    def __getitem__(self, index):
        time.sleep(0.01)
        return torch.ones(16)


def slow_on_rank_1():
    if dist.get_rank() == 1:
        time.sleep(0.05)


def starved():
    return train(loader=DataLoader(Slow(), batch_size=4))


def slow():
    return train(before=slow_on_rank_1)


def forgotten():
    return train(microbatches=3)


def searching():
    return train(find_unused_parameters=True)


def tiny_buckets():
    return train(nn.Sequential(*[nn.Linear(16, 16) for _ in range(12)]), bucket_cap_mb=0.0005)


def lopsided_pipeline():
    me, layer = dist.get_rank(), nn.Linear(16, 16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(STEPS):
        if me == 0:
            out = layer(torch.ones(4, 16))
            dist.send(out.detach(), 1)  # moves 256 bytes
            gradient = torch.empty(4, 16)
            dist.recv(gradient, 1)  # moves 256 bytes
            out.backward(gradient)
        else:
            x = torch.empty(4, 16, requires_grad=True)
            dist.recv(x.data, 0)  # moves 256 bytes
            time.sleep(0.05)
            layer(x).sum().backward()
            dist.send(x.grad, 0)  # moves 256 bytes
        optimizer.step()


@pytest.mark.parametrize(
    ("script", "cause", "seen"),
    [
        (starved, "starved DataLoader", "for its next batch"),
        (slow, "slow rank", "rank 1 works"),
        (forgotten, "no_sync forgotten", "3 backward passes per optimizer step"),
        (searching, "find_unused_parameters", "every parameter got its gradient"),
        (tiny_buckets, "many tiny buckets", "all-reduces of"),
        (lopsided_pipeline, "imbalanced pipeline", "stage 1 is the longest"),
    ],
)
def test_a_planted_cause_is_named_with_its_evidence_and_a_remedy(script, cause, seen):
    run = observe(script)
    found = diagnose(run)
    assert cause in found.causes
    finding = next(f for f in found.findings if f.cause == cause)
    assert seen in finding.evidence
    assert len(finding.remedy) > 20
    assert len(run.records[0].steps) == STEPS


def test_oversubscribed_threads_are_named():
    found = diagnose(observe(train, threads=8))
    assert "oversubscribed threads" in found.causes
    assert "2 ranks x 8 threads = 16 on" in repr(found)


def test_no_sync_that_was_not_forgotten_is_not_blamed():
    def careful():
        model = DDP(nn.Linear(16, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(STEPS):
            with model.no_sync():
                model(torch.ones(8, 16)).sum().backward()
            model(torch.ones(8, 16)).sum().backward()
            optimizer.step()

    assert "no_sync forgotten" not in diagnose(observe(careful)).causes


def test_parameters_that_are_really_unused_excuse_the_search():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(16, 4), nn.Linear(16, 4)

        def forward(self, x):
            return self.used(x)

    found = diagnose(observe(lambda: train(Two(), find_unused_parameters=True)))
    assert "find_unused_parameters" not in found.causes


def test_the_training_function_runs_unchanged_and_its_values_come_back():
    run = observe(train)
    assert run.values == ["done", "done"]
    assert run.records[0].samples == 8
    assert run.records[0].traffic.payload_bytes(kind="all_reduce") == (16 * 4 + 4) * 4


def made_up(own=(0.1, 0.1), moved=(0.0, 0.0), data=0.0, threads=1, cores=2, backwards=1,
            wrappers=(), traffic=None):  # fmt: skip
    wall = max(o + m for o, m in zip(own, moved, strict=True)) + data
    records = tuple(
        RankRecord(
            rank, threads, 4,
            tuple(StepRecord(wall, m, data, o, 0.0, backwards) for _ in range(8)),
            traffic, wrappers,
        )
        for rank, (o, m) in enumerate(zip(own, moved, strict=True))
    )  # fmt: skip
    return Run(records, cores, name="made up")


def test_a_healthy_run_is_left_alone():
    found = diagnose(made_up(moved=(0.005, 0.005)))
    assert not found
    assert "nothing stands out" in repr(found)


def test_transfer_longer_than_the_work_is_a_tiny_batch():
    found = diagnose(made_up(own=(0.01, 0.01), moved=(0.02, 0.02)))
    assert found.causes == ["tiny batch"]
    assert found.findings[0].lost_s == pytest.approx(0.02)
    assert "its 4 samples" in repr(found)


def test_one_bucket_that_nothing_hides_is_named():
    wrapper = Wrapper(False, 0, 8_000_000, (8_000_000,))
    found = diagnose(made_up(moved=(0.05, 0.05), wrappers=(wrapper,)))
    assert found.causes == ["one huge bucket"]
    several = Wrapper(False, 0, 8_000_000, (2_000_000,) * 4)
    assert not diagnose(made_up(moved=(0.05, 0.05), wrappers=(several,)))


def test_few_parameters_in_few_buckets_are_not_called_tiny():
    small = Wrapper(False, 0, 90_000, (30_000,) * 3)
    assert not diagnose(made_up(wrappers=(small,)))
    mixed = Wrapper(False, 0, 4_208_192, (2048, 1_050_000) * 4)
    assert diagnose(made_up(wrappers=(mixed,))).causes == ["many tiny buckets"]


def test_a_single_bucket_within_the_default_is_not_blamed_for_a_tiny_batch():
    default = Wrapper(False, 0, 8_000_000, (8_000_000,), 25 * 2**20)
    tiny = made_up(own=(0.01, 0.01), moved=(0.02, 0.02), wrappers=(default,))
    assert diagnose(tiny).causes == ["tiny batch"]
    raised = Wrapper(False, 0, 2_000_000, (2_000_000,), 1000 * 2**20)
    assert diagnose(made_up(moved=(0.03, 0.03), wrappers=(raised,))).causes == ["one huge bucket"]


def test_a_rank_that_was_pushed_off_its_core_is_not_blamed_for_another_that_works_longer():
    steps = {  # wall, communication, data, cpu, queued, backwards, pushed
        0: StepRecord(0.149, 0.027, 0.0, 0.03, 0.09, 1, 0.09),
        1: StepRecord(0.149, 0.020, 0.0, 0.03, 0.04, 1, 0.04),
    }
    records = tuple(RankRecord(r, 1, 4, (step,) * 8, None, ()) for r, step in steps.items())
    found = diagnose(Run(records, 2)).findings[0]
    assert found.cause == "slow rank"
    assert found.evidence.startswith("rank 1 works")


def test_bytes_on_the_slower_of_two_networks_are_the_wrong_interface():
    slow = Road("eth1", "10.78.0.1", 9_000_000, 12.5e6)
    fast = Road("eth0", "10.77.0.1", 40_000, 900e6)
    run = made_up(moved=(0.05, 0.05))
    records = (replace(run.records[0], roads=(slow, fast)), run.records[1])
    found = diagnose(replace(run, records=records))
    assert found.causes == ["wrong network interface"]
    assert "went over eth1 (10.78.0.1)" in found.findings[0].evidence
    assert "GLOO_SOCKET_IFNAME=eth0" in found.findings[0].remedy
    right = (replace(slow, sent_bytes=40_000), replace(fast, sent_bytes=9_000_000))
    records = (replace(run.records[0], roads=right), run.records[1])
    assert not diagnose(replace(run, records=records))


def over_the_slow_network(steps=6):
    os.environ["GLOO_SOCKET_IFNAME"] = "eth1"
    return train(nn.Linear(256, 256), steps, process_group=dist.new_group())


@pytest.mark.skipif(bool(cluster.reasons_against()), reason="no node lab on this machine")
def test_two_nodes_that_talk_over_the_wrong_one_of_two_networks():
    with cluster.Nodes(2) as lab:
        for node in range(2):
            for command in (
                "ip link add link eth0 name eth1 type macvlan mode bridge",
                f"ip addr add 10.78.0.{node + 1}/24 dev eth1",
                "ip link set eth1 up",
                "tc qdisc add dev eth1 root tbf rate 20mbit burst 16k latency 100ms",
            ):
                done = lab.run(node, command.split())
                assert done.returncode == 0, done.stderr
        with lab.ranks(timeout=120) as ranks:
            found = diagnose(observe(over_the_slow_network, ranks=ranks))
    assert found.causes[:1] == ["wrong network interface"]
    assert "went over eth1" in repr(found)


def test_waiting_for_a_slow_rank_is_not_called_transfer():
    found = diagnose(made_up(own=(0.02, 0.1), moved=(0.09, 0.01)))
    assert found.causes == ["slow rank"]
    assert found.findings[0].lost_s == pytest.approx(0.08)


def test_the_costliest_cause_comes_first():
    found = diagnose(made_up(own=(0.05, 0.1), moved=(0.05, 0.0), data=0.2))
    assert found.causes == ["starved DataLoader", "slow rank"]


def test_the_same_stage_imbalance_is_a_pipelines_when_ranks_send_to_each_other():
    flow = Flow("send", "world", "forward", 2, 4, 1000, 1000.0, 1000.0)
    found = diagnose(made_up(own=(0.02, 0.1), moved=(0.09, 0.01), traffic=Traffic(0, (flow,))))
    assert found.causes == ["imbalanced pipeline"]


def test_a_run_without_optimizer_steps_says_so():
    run = Run((RankRecord(0, 1, 0, (), None, ()),), 2)
    with pytest.raises(ValueError, match="no optimizer stepped"):
        diagnose(run)
