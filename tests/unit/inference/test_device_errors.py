"""Classification of device errors by the texts of torch, CUDA, HIP and ONNX Runtime."""

from __future__ import annotations

import pytest
import torch

from batchjob.inference.device_errors import classify_device_error
from batchjob.inference.devices import identify_device

# Texts of torch 2.11 to 2.15, of its libraries and of ONNX Runtime; the first line of those of CUDA.
CONTEXT = [
    "CUDA error: device-side assert triggered",
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: an illegal instruction was encountered",
    "CUDA error: misaligned address",
    "CUDA error: invalid program counter",
    "CUDA error: operation not supported on global/shared address space",
    "CUDA error: unspecified launch failure",
    "CUDA error: the launch timed out and was terminated",
    "HIP error: an illegal memory access was encountered",
    "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=gpu-1",
    "Triton Error [CUDA]: an illegal memory access was encountered",
    "CUDA driver error: unspecified launch failure",
]
HARDWARE = [
    "CUDA error: uncorrectable ECC error encountered",
    "CUDA error: uncorrectable NVLink error detected during the execution",
    "CUDA error: hardware stack error",
    "CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error",
    "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
    "CUDA error: unknown error",
]
HARMLESS = [
    "CUDA out of memory. Tried to allocate 20.00 GiB",
    "CUDA error: out of memory",
    "CUDA error: invalid argument",
    "CUDA error: no kernel image is available for execution on the device",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
    "mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)",
]
ADVICE = """
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""


@pytest.mark.parametrize("kind", [RuntimeError, torch.AcceleratorError])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((text, "context") for text in CONTEXT),
        *((text, "hardware") for text in HARDWARE),
        *((text, None) for text in HARMLESS),
    ],
)
def test_texts_of_errors_are_classified(text: str, expected: str | None, kind: type[Exception]) -> None:
    assert classify_device_error(kind(text)) == expected


def test_cause_of_an_error_counts() -> None:
    error = ValueError("the model fails on an example batch")
    error.__cause__ = RuntimeError(CONTEXT[0])
    assert classify_device_error(error) == "context"


@pytest.mark.parametrize("text", ["CUDA error: invalid argument", "mat1 and mat2 shapes cannot be multiplied"])
def test_general_advice_of_cuda_is_not_taken_for_an_assert(text: str) -> None:
    assert classify_device_error(torch.AcceleratorError(f"{text}{ADVICE}")) is None


def test_error_that_was_being_handled_counts() -> None:
    error = KeyError("cleanup failed")
    error.__context__ = RuntimeError(HARDWARE[0])
    assert classify_device_error(error) == "hardware"


def test_hardware_fault_outweighs_the_broken_context_that_follows_it() -> None:
    error = RuntimeError(CONTEXT[0])
    error.__cause__ = RuntimeError(HARDWARE[0])
    assert classify_device_error(error) == "hardware"


def test_errors_that_cause_each_other_are_read_once() -> None:
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__cause__, second.__cause__ = second, first
    assert classify_device_error(first) is None


@pytest.mark.parametrize(("answer", "expected"), [(CONTEXT[1], "context"), (HARDWARE[0], "hardware"), (None, None)])
def test_unknown_error_on_a_gpu_is_decided_by_a_probe(
    monkeypatch: pytest.MonkeyPatch, answer: str | None, expected: str | None
) -> None:
    probes = set_probe(monkeypatch, answer)
    assert classify_device_error(RuntimeError("nothing known"), torch.device("cuda:1")) == expected
    assert probes == [torch.device("cuda:1")]


@pytest.mark.parametrize(
    ("text", "expected"), [("CUDA out of memory. Tried to allocate 20.00 GiB", None), (CONTEXT[0], "context")]
)
def test_gpu_is_not_probed_if_the_text_decides(
    monkeypatch: pytest.MonkeyPatch, text: str, expected: str | None
) -> None:
    probes = set_probe(monkeypatch, HARDWARE[0])
    assert classify_device_error(RuntimeError(text), torch.device("cuda")) == expected
    assert probes == []


def set_probe(monkeypatch: pytest.MonkeyPatch, answer: str | None) -> list[torch.device]:
    """Make the probe of a GPU fail with a text, or succeed if it is None; return the list of probed devices."""
    probes: list[torch.device] = []

    def synchronize(device: torch.device) -> None:
        probes.append(device)
        if answer is not None:
            raise torch.AcceleratorError(answer)

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    return probes


def test_cpu_is_not_probed() -> None:
    assert classify_device_error(RuntimeError("nothing known"), torch.device("cpu")) is None
    assert identify_device(torch.device("cpu")) == "cpu"


@pytest.mark.gpu
def test_gpu_has_a_unique_name_and_is_probed() -> None:
    device = torch.device("cuda:0")
    assert "GPU-" in identify_device(device)
    assert classify_device_error(RuntimeError("nothing known"), device) is None
