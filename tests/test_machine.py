"""The machine card says what is there and what it cannot show."""

from __future__ import annotations

import dataclasses
import os

from pardemo.machine import machine


def test_the_card_names_cpu_cores_torch_and_backend() -> None:
    here = machine()
    card = here.card()
    assert here.cpu in card
    assert f"{len(os.sched_getaffinity(0))} cores" in card
    assert here.torch in card
    assert here.backend in card
    assert str(here) == card


def test_without_a_gpu_devices_are_cores_and_the_card_says_what_that_means() -> None:
    here = dataclasses.replace(machine(), gpus=(), cores=2)
    assert here.devices == 2
    assert any("no GPU" in said for said in here.limits)
    assert any(said.startswith("2 devices") for said in here.limits)


def test_one_gpu_cannot_show_a_gpu_to_gpu_transfer_and_eight_can() -> None:
    one = dataclasses.replace(machine(), gpus=("H100",))
    assert any("no GPU-to-GPU" in said for said in one.limits)
    eight = dataclasses.replace(machine(), gpus=("H100",) * 8)
    assert eight.devices == 8
    assert not any("no GPU" in said for said in eight.limits)


def test_a_busy_machine_is_not_trusted_and_says_why() -> None:
    quiet = dataclasses.replace(machine(), cores=2, load=0.3, waiting=0.0)
    assert quiet.trust() == []
    busy = dataclasses.replace(quiet, load=5.0, waiting=60.0)
    assert len(busy.trust()) == 2
    assert "WARNING" in busy.card()
