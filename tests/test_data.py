"""Data are real, offline, the same everywhere, and their parts make up the whole."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
import torch

from pardemo import data


def test_digits_are_the_1797_of_scikit_learn() -> None:
    pixels, labels = data.digits()
    assert pixels.shape == (1797, 64)
    assert (pixels.min().item(), pixels.max().item()) == (0.0, 1.0)
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_text_is_the_standard_library_in_alphabetical_order_and_capped() -> None:
    text = data.text(50_000)
    first = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[0].read_bytes()
    assert len(text) == 50_000
    assert bytes(text[: min(len(first), 50_000)].tolist()) == first[:50_000]
    assert torch.equal(data.text(1000), text[:1000])


def test_images_of_a_class_look_alike_and_classes_differ() -> None:
    pictures, labels = data.images(400, size=8, classes=4, seed=1)
    means = torch.stack([pictures[labels == c].mean(0) for c in range(4)])
    again, labels = data.images(400, size=8, classes=4, seed=2)
    distance = (again[:, None] - means).flatten(2).norm(dim=2)
    assert (distance.argmin(1) == labels).float().mean() > 0.95


def test_windows_pair_each_token_with_the_one_that_follows() -> None:
    source = torch.arange(100, dtype=torch.uint8)
    inputs, targets = data.windows(5, 7, step=3, seed=0, source=source)
    assert inputs.shape == (5, 7)
    assert torch.equal(inputs + 1, targets)
    assert torch.equal(inputs, data.windows(5, 7, 3, 0, source)[0])
    assert not torch.equal(inputs, data.windows(5, 7, 4, 0, source)[0])


def test_an_epoch_draws_every_sample_once_and_the_next_in_another_order() -> None:
    steps = [data.draw(4, 12, step, seed=0) for step in range(6)]
    first, second = torch.cat(steps[:3]), torch.cat(steps[3:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(12))
    assert first.tolist() != second.tolist()
    across = data.draw(5, 12, 2, seed=0)  # samples 10 to 14: two of this epoch, three of the next
    assert across.tolist() == first[10:].tolist() + second[:3].tolist()


@pytest.mark.parametrize(("samples", "ranks"), [(8, 2), (7, 2), (10, 4), (5, 3)])
def test_shards_make_up_the_batch_and_differ_by_at_most_one(samples: int, ranks: int) -> None:
    batch = torch.arange(samples), torch.arange(samples) * 10
    parts = [data.shard(batch, rank, ranks) for rank in range(ranks)]
    assert torch.cat([p[0] for p in parts]).tolist() == batch[0].tolist()
    assert torch.cat([p[1] for p in parts]).tolist() == batch[1].tolist()
    sizes = [len(p[0]) for p in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
