"""Counting a model that is not there: against formulae, and at 1,024 ranks in one process."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.attention import SDPBackend, sdpa_kernel

from pardemo import count, predict
from pardemo.models import ResNet50

D, H, OUT = 64, 256, 32


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, OUT))


def _batch(n: int = 16):
    return torch.zeros(n, D), torch.zeros(n, OUT)


def test_flops_of_linear_layers_are_the_formula():
    seen = count.describe(_mlp, F.mse_loss, _batch())
    assert seen.forward_flops + seen.backward_flops == predict.linear_train([D, H, OUT], 16)
    assert seen.layers.flops == (2 * D * H, 0.0, 2 * H * OUT)
    assert seen.parameters == D * H + H + H * OUT + OUT


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = (
            nn.Linear(hidden, 3 * hidden),
            nn.Linear(hidden, hidden),
            heads,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, h = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.heads, h // self.heads).unbind(2)
        mixed = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return self.out(mixed.transpose(1, 2).reshape(b, s, h))


def test_attention_is_counted_although_the_fused_cpu_kernel_counts_nothing():
    x = torch.zeros(2, 128, 64)
    seen = count.describe(lambda: Attention(64, 4), F.mse_loss, (x, x))
    # 8 h^2 projections + 4 s h scores per token, forward
    assert seen.forward_flops == 2 * 128 * (8 * 64**2 + 4 * 128 * 64)


def test_a_model_of_a_hundred_billion_parameters_is_counted_without_its_memory():
    def huge() -> nn.Module:
        return nn.Sequential(*(nn.Linear(50_000, 50_000, bias=False) for _ in range(40)))

    seen = count.describe(huge, F.mse_loss, (torch.zeros(1, 50_000, device="meta"),) * 2)
    assert seen.parameters == 40 * 50_000**2
    assert seen.forward_flops == 2 * seen.parameters


def test_what_backward_needs_is_counted_once_and_parameters_are_not():
    seen = count.describe(_mlp, F.mse_loss, _batch())
    # the input, the ReLU's output (shared with the next layer), prediction and target of the loss
    assert seen.saved_bytes == 4 * 16 * (D + H + OUT + OUT)


def test_the_layers_feed_the_predictor():
    layers = count.describe(_mlp, F.mse_loss, _batch()).layers
    assert layers.names == ("0", "1", "2")
    assert layers.total_parameters == D * H + H + H * OUT + OUT
    assert layers.output_bytes == (4 * H, 4 * H, 4 * OUT)


def test_a_layer_that_works_on_data_has_half_of_a_backward_pass():
    seen = count.describe(_mlp, F.mse_loss, _batch())
    assert seen.layers.backward == (2 * D * H, 0.0, 4 * H * OUT)
    assert 16 * sum(seen.layers.backward) == seen.backward_flops


def _training(model: nn.Module, size: int = 8):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        x, y = torch.zeros(size, D), torch.zeros(size, OUT)
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.parametrize("ranks", [2, 64, 1024])
def test_fsdp_at_any_world_size_sends_what_the_closed_form_says(ranks):
    shapes = [(D, D)] * 4

    def build(mesh):
        model = nn.Sequential(*(nn.Linear(D, D, bias=False) for _ in shapes))
        model.append(nn.Linear(D, OUT, bias=False))
        for layer in model[:4]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return _training(model)

    seen = count.messages(build, {"dp": ranks})
    root = predict.padded([(OUT, D)], ranks)
    whole = predict.padded(shapes, ranks) + root
    said = predict.sent_bytes("fsdp", ranks=ranks, parameters=whole, root=root, units=5)
    for kind in ("all_gather", "reduce_scatter"):
        assert seen.calls(kind=kind) == said.calls(kind)
        assert seen.sent_bytes(kind=kind) == pytest.approx(said.by_kind()[kind], rel=1e-12)


def test_tensor_parallel_sends_one_all_reduce_forward_and_none_back_to_data():
    def build(mesh):
        model = _mlp()
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        return _training(parallelize_module(model, mesh, plan))

    seen = count.messages(build, {"tp": 8}, fake=False)
    said = predict.sent_bytes(
        "tensor", ranks=8, layers=1, pairs_per_layer=1, activation_bytes=8 * OUT * 4,
        input_needs_grad=False,
    )  # fmt: skip
    assert seen.calls(kind="all_reduce") == said.calls("all_reduce") == 1
    assert seen.sent_bytes(kind="all_reduce") == said.total


def test_the_fake_world_is_gone_afterwards_and_refuses_a_second_one():
    with count.fake_world(4, rank=3):
        assert (dist.get_rank(), dist.get_world_size()) == (3, 4)
        with (
            pytest.raises(RuntimeError, match="a process group is running here"),
            count.fake_world(2),
        ):
            pass
    assert not dist.is_initialized()


class Translator(nn.Module):
    """A plain encoder and decoder that read the same sequence."""

    def __init__(self, hidden: int, heads: int, layers: int, ffn: int) -> None:
        super().__init__()
        self.both = nn.Transformer(hidden, heads, layers, layers, ffn, 0.0, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.both(x, x)


def test_an_encoder_and_decoder_are_counted_as_their_formula():
    h, s, f, layers = 64, 32, 256, 2
    x = torch.zeros(3, s, h)
    seen = count.describe(lambda: Translator(h, 4, layers, f), F.mse_loss, (x, x))
    # per token: an attention 8 h^2 + 4 s h, an MLP 4 h f; the decoder attends twice
    attention, mlp = 8 * h * h + 4 * s * h, 4 * h * f
    assert seen.forward_flops == 3 * s * layers * (3 * attention + 2 * mlp)


def test_resnet50_is_counted_as_published():
    x, y = torch.zeros(2, 3, 224, 224, device="meta"), torch.zeros(2, dtype=torch.long)
    seen = count.describe(ResNet50, F.cross_entropy, (x, y))
    assert seen.parameters == 25_557_032  # torchvision's count
    # He 2016, table 1: 3.8e9 multiply-adds; 4.09e9 with the stride on the 3x3, as torchvision
    assert seen.forward_flops / 2 == pytest.approx(2 * 4.09e9, rel=0.01)


def test_a_mixture_of_experts_is_counted_with_every_choice_kept():
    from torch.utils.flop_counter import FlopCounterMode

    from pardemo.models.moe import MoEConfig, MoEGPT, moe_loss

    config = MoEConfig(n_layer=1, n_embd=16, n_head=2, vocab_size=32, block_size=8)
    tokens = torch.randint(0, 32, (3, 8))
    seen = count.describe(lambda: MoEGPT(config), moe_loss, (tokens, tokens))
    real = MoEGPT(dataclasses.replace(config, capacity_factor=None))  # no token is dropped
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        real(tokens)
    assert seen.forward_flops == counter.get_total_flops()
    assert seen.parameters == sum(p.numel() for p in real.parameters())
