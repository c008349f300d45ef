"""diagnose(): causes planted in real training functions, and in made-up records."""

from __future__ import annotations

import io
import os
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Dataset

from pardemo import cluster
from pardemo.measure import diagnose, observe
from pardemo.measure.instruments import Recorder
from pardemo.measure.observe import Run
from pardemo.measure.watched import RankRecord

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


class Disk(io.BytesIO):
    def write(self, data):
        time.sleep(0.02)
        return super().write(data)


def saving():
    layer = nn.Linear(16, 4)
    return train(layer, before=lambda: torch.save(layer.state_dict(), Disk()))


def chattering():
    def losses():
        for _ in range(40):
            dist.all_reduce(torch.ones(1))  # moves 4 bytes

    return train(before=losses)


def looking_around():
    return train(before=lambda: time.sleep(0.1))


@pytest.mark.parametrize(
    ("script", "cause", "seen"),
    [
        (starved, "starved DataLoader", "for its next batch"),
        (slow, "slow rank", "rank 1 works"),
        (forgotten, "no_sync forgotten", "3 backward passes per optimizer step"),
        (searching, "find_unused_parameters", "every parameter got its gradient"),
        (tiny_buckets, "many tiny buckets", "all-reduces of"),
        (lopsided_pipeline, "imbalanced pipeline", "stage 1 is the longest"),
        (saving, "saving in every step", "in torch.save"),
        (chattering, "many small collectives", "the script itself makes 40 collectives"),
        (looking_around, "work outside of training", "pass on every rank"),
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


def test_a_run_without_optimizer_steps_says_so():
    run = Run((RankRecord(0, 1, 0, (), None, ()),), 2)
    with pytest.raises(ValueError, match="no optimizer stepped"):
        diagnose(run)


class ByRows(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                for row in p.split(1):
                    row.add_(0.001)


def test_torchs_own_optimizer_is_not_held_against_another_of_torchs():
    for kind, tried in ((torch.optim.SGD, 0), (ByRows, 2)):
        net, recorder = nn.Linear(4, 2), Recorder()
        with recorder.attached():
            optimizer = kind(net.parameters(), lr=0.1)
            net(torch.ones(1, 4)).sum().backward()
            optimizer.step()
        assert len(recorder._parameters_shapes) == tried
