"""FLOPs counted against formulas, exactly, and the three traps of the counter."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from pardemo.measure import Utilization, count_flops, peak_flops
from pardemo.models import GPT, GPTConfig


def trainer(net, make_input):
    def step():
        net(make_input()).sum().backward()

    return step


def test_an_mlp_counts_2bio_forward_and_3_times_less_the_first_input_gradient():
    sizes, batch = (30, 50, 20, 10), 8
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    found = count_flops(trainer(nn.Sequential(*layers), lambda: torch.ones(batch, sizes[0])))
    products = sum(a * b for a, b in pairwise(sizes))
    assert found.total == 2 * batch * (3 * products - sizes[0] * sizes[1])
    assert sum(found.by_operator.values()) == found.total


def test_a_gpt_counts_the_formula_of_its_matrix_products():
    config = GPTConfig(
        block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32, dropout=0.0
    )  # fmt: skip
    model, batch, length, h = GPT(config), 3, 16, 32
    tokens = torch.zeros(batch, length, dtype=torch.long)
    forward = count_flops(lambda: model(tokens)).total
    per_token = 2 * (24 * h * h + 4 * length * h) + 2 * h * 64
    assert forward == batch * length * per_token
    trained = count_flops(lambda: model(tokens).sum().backward()).total
    assert trained == 3 * forward


def attend(length=8, heads=2, dim=4):
    q, k, v = (torch.ones(1, heads, length, dim, requires_grad=True) for _ in range(3))
    return lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()


def test_trap_one_attention_on_a_cpu_counts_zero_but_not_here():
    if torch.cuda.is_available():
        pytest.skip("a CPU's trap; this machine has a GPU")
    with FlopCounterMode(display=False) as naive:
        attend()()
    assert naive.get_total_flops() == 0
    assert count_flops(attend()).total == 3 * 2 * (2 * 2 * 8 * 8 * 4)


def tensor_parallel():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    net = parallelize_module(nn.Linear(16, 32, bias=False), mesh, ColwiseParallel())
    with FlopCounterMode(display=False) as naive:
        net(torch.ones(4, 16))
    return naive.get_total_flops(), count_flops(lambda: net(torch.ones(4, 16)))


def test_trap_two_sharded_tensors_count_as_a_whole_on_every_rank_but_not_here(ranks2):
    whole = 2 * 4 * 16 * 32
    for naive, found in ranks2(tensor_parallel):
        assert naive == whole
        assert found.total == whole / 2
        assert "add ranks up for the whole" in repr(found)


def test_trap_three_a_fused_attention_backward_counts_its_recomputation():
    shape = (1, 2, 8, 4)
    forward = sdpa_flop_count(shape, shape, shape)
    assert sdpa_backward_flop_count(shape, shape, shape, shape) == 2.5 * forward


def test_the_peak_is_measured_and_says_with_what():
    peak = peak_flops(sizes=(64, 128), seconds=0.02, threads=1)
    assert float(peak) > 1e6
    assert peak.size in (64, 128)
    assert "float32 product" in repr(peak)
    before = torch.get_num_threads()
    peak_flops(sizes=(32,), seconds=0.01, threads=before + 1)
    assert torch.get_num_threads() == before


def test_a_utilisation_carries_its_convention_and_doubts_more_than_everything():
    good = Utilization(4e9, 0.1, 2, 100e9, "6N")
    assert good.share == pytest.approx(0.2)
    assert "MFU 20.0% (6N): 4 GFLOP in 100 ms on 2 x 100 GFLOP/s" in repr(good)
    assert "above 1: the count or the peak is wrong" in repr(Utilization(4e9, 0.001, 2, 1e9, "6N"))
