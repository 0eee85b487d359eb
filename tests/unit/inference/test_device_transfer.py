"""Copies between host and device."""

from __future__ import annotations

import pytest
import torch

from batchjob.inference.device_transfer import DeviceTransfer

CPU = torch.device("cpu")


def test_host_tensor_is_not_copied_to_the_cpu() -> None:
    pixels = torch.arange(6, dtype=torch.uint8)
    assert DeviceTransfer(CPU).to_device(pixels) is pixels


def test_tensor_moves_to_a_device_other_than_the_host() -> None:
    moved = DeviceTransfer(torch.device("meta")).to_device(torch.zeros(2, 3, dtype=torch.uint8))
    assert (moved.device.type, moved.shape, moved.dtype) == ("meta", (2, 3), torch.uint8)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int64, torch.int64),
        (torch.bool, torch.bool),
    ],
)
def test_only_half_precision_is_widened_on_the_host(dtype: torch.dtype, expected: torch.dtype) -> None:
    # All of these values are exact in bfloat16, which has 8 bits of mantissa.
    values = torch.tensor([0.0, 1.0, -1.5, 96.0]).to(dtype)
    received = DeviceTransfer(CPU).to_host({"scores": values})["scores"]
    assert received.dtype == expected
    assert torch.equal(received, values.to(expected))


def test_results_in_host_memory_need_no_wait() -> None:
    assert DeviceTransfer(CPU).sync() is None


@pytest.mark.gpu
def test_results_of_a_gpu_are_complete_after_the_wait() -> None:
    transfer = DeviceTransfer(torch.device("cuda:0"))
    pixels = torch.arange(1 << 20, dtype=torch.uint8).pin_memory()
    results = transfer.to_host({"sum": transfer.to_device(pixels).half() + 1})
    wait = transfer.sync()
    assert wait is not None
    wait()
    assert results["sum"].is_pinned()
    assert torch.equal(results["sum"], pixels.float() + 1)
