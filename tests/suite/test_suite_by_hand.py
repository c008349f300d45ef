"""Bytes counted on real ranks against numbers worked out by hand, digit by digit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pardemo.launch import Ranks
from pardemo.models import GPT, GPTConfig
from pardemo.suite import inside
from pardemo.workloads import Workload, sgd, token_loss


def small(seed: int) -> nn.Module:
    """20 -> 30 -> 10: 20*30 + 30 + 30*10 + 10 = 940 parameters, 3760 bytes."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))


def numbers(size: int, step: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(size, 20), torch.zeros(size, dtype=torch.long)


def gpt(seed: int) -> nn.Module:
    """2 layers of width 32, 4 heads, 16 tokens."""
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=64, block_size=16, n_layer=2, n_head=4, n_embd=32))


def tokens(size: int, step: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(size, 16, dtype=torch.long), torch.ones(size, 16, dtype=torch.long)


class Blocks(nn.Module):
    """Two blocks of 16*16 = 256 parameters each, and a head of 16*4 = 64 that is nobody's block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(2))
        self.head = nn.Linear(16, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def blocks(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Blocks()


def wide(size: int, step: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(size, 16), torch.zeros(size, dtype=torch.long)


SMALL = Workload("small", small, numbers, F.cross_entropy, sgd, 8)
TINY_GPT = Workload("tiny", gpt, tokens, token_loss, sgd, 8)
BLOCKS = Workload("blocks", blocks, wide, F.cross_entropy, sgd, 8)
Lines = dict[tuple[str, str], float]


def sent(name: str, work: Workload, ranks: Ranks, count: int, **knobs: object) -> list[Lines]:
    """For every rank: (phase, kind) -> bytes sent."""
    maker = inside.Maker(name, work, 8, tuple(knobs.items()))
    found: list[Lines] = []
    for seen in ranks(inside.look, maker, count):
        lines: Lines = {}
        for flow in seen.traffic.flows:
            if flow.sent_bytes:
                key = (flow.phase, flow.kind)
                lines[key] = lines.get(key, 0.0) + flow.sent_bytes
        found.append(lines)
    return found


def test_ddp_of_an_mlp_on_two_and_four_ranks(ranks2: Ranks, ranks4: Ranks) -> None:
    # 2 * (1/2) * 3760 bytes of gradients; 2 * (1/2) * 4 of the loss
    for lines in sent("ddp", SMALL, ranks2, 2):
        assert lines == {("backward", "all_reduce"): 3760, ("forward", "all_reduce"): 4}
    # 2 * (3/4) * 3760 = 5640; 2 * (3/4) * 4 = 6
    for lines in sent("ddp", SMALL, ranks4, 4):
        assert lines == {("backward", "all_reduce"): 5640, ("forward", "all_reduce"): 6}


def test_zero_1_hands_round_what_each_rank_owns(ranks2: Ranks, ranks4: Ranks) -> None:
    # of 600, 30, 300 and 10 numbers rank 0 owns the 600, rank 1 the 300, the 30 and the 10
    reduced = {("backward", "all_reduce"): 3760, ("forward", "all_reduce"): 4}
    first, second = sent("zero1", SMALL, ranks2, 2)
    assert first == {**reduced, ("optimizer", "broadcast"): 2400}
    assert second == {**reduced, ("optimizer", "broadcast"): 1360}
    # of four ranks each owns one tensor, 600, 300, 30, 10; along gloo's tree its owner sends it
    # twice and the next rank once: 2 * 600 + 10, 2 * 300 + 600, 2 * 30 + 300, 2 * 10 + 30, times 4
    found = [lines["optimizer", "broadcast"] for lines in sent("zero1", SMALL, ranks4, 4)]
    assert found == [4840, 4800, 1440, 200]
    assert sum(found) == 3 * 3760


def test_a_tensor_parallel_gpt_sums_four_activations_per_layer(ranks2: Ranks) -> None:
    # A = 8 samples * 16 tokens * 32 wide * 4 bytes = 16384; 2 layers * 2 forward, 2 * 2 backward
    for lines in sent("tensor", TINY_GPT, ranks2, 2):
        assert lines == {("forward", "all_reduce"): 65536, ("backward", "all_reduce"): 65536}


def test_a_pipeline_of_four_microbatches(ranks2: Ranks) -> None:
    # cut after Linear(20, 30) or its ReLU: 2 samples * 30 * 4 bytes = 240, four times = 960 a way;
    # the loss, 8 bytes, goes to all from the last
    first, last = sent("pipeline", SMALL, ranks2, 2, microbatches=4)
    assert first == {("forward", "send"): 960}
    assert last == {("backward", "send"): 960, ("backward", "broadcast"): 8}


def test_fsdp_does_not_gather_its_root_again(ranks2: Ranks) -> None:
    # forward: all 256 + 256 + 64 = 576 numbers, 1/2 * 2304 bytes; backward: the blocks' 512 only;
    # gradients: 1/2 * 2304 by reduce-scatter, twice that on gloo
    for lines in sent("fsdp", BLOCKS, ranks2, 2):
        assert lines == {
            ("forward", "all_gather"): 1152,
            ("backward", "all_gather"): 1024,
            ("backward", "reduce_scatter"): 2304,
            ("forward", "all_reduce"): 4,
        }


def test_two_replicas_of_a_sliced_gpt(ranks4: Ranks) -> None:
    # each of 2 rows has 4 samples: A = 8192, 4 all-reduces a way over "tp"; over "dp" the gradients
    # held: whole are token 64*32 and position 16*32 embeddings and 5 norms of 32, sliced in half
    # per layer 4 * 32*32 of attention and 2 * 32*128 of the feed-forward:
    # (2048 + 512 + 160 + 2 * 12288 / 2) * 4 = 60032 bytes, and the loss
    for lines in sent("dp_tp", TINY_GPT, ranks4, 4):
        assert lines == {
            ("forward", "all_reduce"): 4 * 8192 + 4,
            ("backward", "all_reduce"): 4 * 8192 + 60032,
        }
