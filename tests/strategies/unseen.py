"""Models as readers bring them: none names its sequence or has seams for a strategy.

Each function takes nothing and returns (model, loss, batch), so "tests.strategies.unseen:name" is a
workload.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrizations import weight_norm

VOCABULARY, WIDTH, LENGTH, SAMPLES = 64, 32, 12, 12


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (SAMPLES, LENGTH))


def classes(count: int) -> torch.Tensor:
    return torch.randint(0, count, (SAMPLES,))


def per_token(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


class Translator(nn.Module):
    """nn.Transformer with a causal mask that its forward makes."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.source, self.target = (nn.Embedding(VOCABULARY, WIDTH) for _ in range(2))
        self.core = nn.Transformer(WIDTH, 4, layers, layers, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], source.device)
        mask = mask.to(self.head.weight.dtype)
        return self.head(self.core(self.source(source), self.target(target), tgt_mask=mask))


def transformer() -> Any:
    return Translator(), per_token, ((tokens(), tokens()), tokens())


class Padded(Translator):
    """The same with a mask of padding, made from the tokens: truth values that stages hand on."""

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        padding = source == 0
        hidden = self.core(
            self.source(source), self.target(target),
            src_key_padding_mask=padding, memory_key_padding_mask=padding,
        )  # fmt: skip
        return self.head(hidden)


def padded() -> Any:
    source = tokens().index_fill(1, torch.tensor([LENGTH - 1]), 0)
    return Padded(), per_token, ((source, tokens()), tokens())


class EncoderClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, 0.0, batch_first=True, norm_first=True)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


def encoder() -> Any:
    return EncoderClassifier(), F.cross_entropy, (tokens(), classes(5))


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embed(x))[0])


def lstm() -> Any:
    return Lstm(), per_token, (tokens(), tokens())


def _double(size_in: int, size_out: int) -> nn.Module:
    convolution = nn.Conv2d(size_in, size_out, 3, padding=1)
    return nn.Sequential(convolution, nn.GroupNorm(2, size_out), nn.ReLU())


class UNet(nn.Module):
    """Two levels down and up, with skip connections."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = _double(1, 8), _double(8, 16), _double(16, 16)
        self.up2, self.up1, self.out = _double(32, 8), _double(16, 8), nn.Conv2d(8, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        low = F.interpolate(self.middle(F.max_pool2d(second, 2)), scale_factor=2)
        high = F.interpolate(self.up2(torch.cat([low, second], 1)), scale_factor=2)
        return self.out(self.up1(torch.cat([high, first], 1)))


def unet() -> Any:
    images = torch.randn(SAMPLES, 1, 8, 8), torch.randn(SAMPLES, 1, 8, 8)
    return UNet(), F.mse_loss, images


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.n, self.m = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.m(self.b(F.relu(self.n(self.a(x))))))


class SharedResnet(nn.Module):
    """A residual network that runs one block, batch norm and all, twice.

    Its buffer is called as an operator is that its forward uses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.first, self.shared, self.last = Residual(8), Residual(8), Residual(8)
        self.head = nn.Linear(8, 5)
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(F.relu(self.norm(self.stem(x - self.mean))))
        return self.head(self.last(self.shared(self.shared(x))).mean((2, 3)))


def resnet() -> Any:
    return SharedResnet(), F.cross_entropy, (torch.randn(SAMPLES, 3, 8, 8), classes(5))


class FusedBlock(nn.Module):
    """Attention whose one Linear makes queries, keys and values, with the heads written down."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        parts = self.qkv(self.norm1(x)).split(d, 2)
        q, k, v = (part.view(b, t, 4, d // 4).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.norm2(x))


class FusedGPT(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(FusedBlock() for _ in range(4))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.token(x) + self.place(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            y = block(y)
        return self.head(self.norm(y))


def gpt_tied() -> Any:
    return FusedGPT(True), per_token, (tokens(), tokens())


def gpt_untied() -> Any:
    return FusedGPT(False), per_token, (tokens(), tokens())


class Buffers(nn.Module):
    """Batch norm, with a moving average or a cumulative one, and three more kinds of buffers."""

    def __init__(self, momentum: float | None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(10, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.n, self.m = nn.BatchNorm1d(16), nn.BatchNorm1d(16, momentum=momentum)
        self.register_buffer("scale", torch.full((10,), 2.0))
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("hidden", torch.ones(16), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.n(self.a(x * self.scale)))
        return self.c(F.relu(self.m(self.b(x * self.hidden))))


def batchnorm() -> Any:
    return Buffers(0.1), F.cross_entropy, (torch.randn(SAMPLES, 10), classes(4))


def cumulative() -> Any:
    return Buffers(None), F.cross_entropy, (torch.randn(SAMPLES, 10), classes(4))


class OwnAverage(nn.Module):
    """Keeps a moving average of what it sees, without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(10, 16), nn.Linear(16, 4)
        self.register_buffer("seen", torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.a(x))
        with torch.no_grad():
            self.seen.lerp_(y.mean(0), 0.1)
        return self.b(y)


def own_average() -> Any:
    return OwnAverage(), F.cross_entropy, (torch.randn(SAMPLES, 10), classes(4))


class Cross(nn.Module):
    """nn.MultiheadAttention from one input to another, called in every way it can be."""

    def __init__(self, how: str = "plain", batch_first: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.how, self.batch_first = how, batch_first
        self.p, self.q, self.head = nn.Linear(6, WIDTH), nn.Linear(7, WIDTH), nn.Linear(WIDTH, 3)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=batch_first, bias=bias)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        q, k = self.p(a), self.q(b)
        n, length, _ = q.shape
        if not self.batch_first:
            q, k = q.transpose(0, 1), k.transpose(0, 1)
        named: dict[str, Any] = {}
        if self.how == "causal":
            future = torch.ones(length, b.shape[1], dtype=torch.bool, device=a.device).triu(1)
            named = {"attn_mask": future, "need_weights": False, "is_causal": True}
        if self.how == "padded":
            named["key_padding_mask"] = (torch.arange(b.shape[1], device=a.device) > 2).expand(
                n, -1
            )
        if self.how == "heads":
            mask = torch.linspace(-1, 1, 4 * length * b.shape[1], dtype=q.dtype, device=a.device)
            mask = mask.view(4, length, -1).repeat(n, 1, 1)
            named = {"attn_mask": mask, "average_attn_weights": False}
        y, weights = self.attention(q, k, 2 * k if self.how == "three" else k, **named)
        y = self.head(y).mean(1 if self.batch_first else 0)
        if weights is None:
            return y
        each = weights if weights.dim() == 3 else weights[:, 0] + 2 * weights[:, 3]
        return y + each.square().mean(1)[:, :3]


def _cross(*choices: Any) -> Any:
    inputs = torch.randn(SAMPLES, 5, 6), torch.randn(SAMPLES, 9, 7)
    return Cross(*choices), F.cross_entropy, (inputs, classes(3))


def cross() -> Any:
    return _cross()


def cross_causal() -> Any:
    return _cross("causal")


def cross_padded() -> Any:
    return _cross("padded", False)


def cross_heads() -> Any:
    return _cross("heads")


def cross_three() -> Any:
    return _cross("three", True, False)


class TwoHeads(nn.Module):
    def __init__(self, named: bool) -> None:
        super().__init__()
        self.named = named
        self.body = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.kind, self.value = nn.Linear(16, 4), nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.body(x)
        kind, value = self.kind(x), self.value(x).squeeze(1)
        return {"kind": kind, "value": value} if self.named else (kind, value)


def _two(output: Any, target: Any) -> torch.Tensor:
    (kind, value), (wanted, number) = (
        tuple(x.values()) if isinstance(x, dict) else x for x in (output, target)
    )
    return F.cross_entropy(kind, wanted) + F.mse_loss(value, number)


def returns_tuple() -> Any:
    target = classes(4), torch.randn(SAMPLES)
    return TwoHeads(False), _two, (torch.randn(SAMPLES, 10), target)


def returns_dict() -> Any:
    target = {"kind": classes(4), "value": torch.randn(SAMPLES)}
    return TwoHeads(True), _two, (torch.randn(SAMPLES, 10), target)


def sequential() -> Any:
    layers = [nn.Linear(10, 16), nn.Dropout(0), nn.ReLU(), nn.Linear(16, 16), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(16, 4))
    return model, F.cross_entropy, (torch.randn(SAMPLES, 10), classes(4))


class Unused(nn.Module):
    """A frozen weight, a frozen bias, and a layer that takes no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(10, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.unused = nn.Linear(3, 3)
        self.a.weight.requires_grad_(False)
        self.b.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(F.gelu(self.b(F.gelu(self.a(x)))))


def unused() -> Any:
    return Unused(), F.cross_entropy, (torch.randn(SAMPLES, 10), classes(4))


class WeightNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = weight_norm(nn.Conv1d(2, 8, 3, padding=1))
        self.norm, self.b = nn.GroupNorm(4, 8), weight_norm(nn.Linear(8, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.b(F.relu(self.norm(self.a(x))).mean(2))))


def parametrized() -> Any:
    return WeightNorm(), F.cross_entropy, (torch.randn(SAMPLES, 2, 7), classes(3))


class Careless(nn.Module):
    """Changes in place what it is given, drops values, and keeps a tensor as a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(10, 16), InPlace(16), InPlace(16)
        self.head, self.scale = nn.Linear(16, 4), torch.full((16,), 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.c(self.b(self.a(x))) * self.scale.to(x.dtype))


class InPlace(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.relu, self.linear, self.drop = nn.ReLU(True), nn.Linear(size, size), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.linear(self.relu(x)))


def careless() -> Any:
    return Careless(), F.cross_entropy, (torch.randn(SAMPLES, 10), classes(4))


def in_place() -> Any:
    model = nn.Sequential(nn.Linear(10, 16), InPlace(16), InPlace(16), Turned(), nn.Linear(16, 4))
    return model, F.cross_entropy, (torch.randn(SAMPLES, 10), classes(4))


class Turned(nn.Module):
    """Hands on what does not lie in memory row by row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.t().contiguous().t()
