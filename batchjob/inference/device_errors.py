"""Classification of exceptions that mean a broken device, or a broken CUDA context of this process."""

from __future__ import annotations

import re
from typing import Literal

import torch

from batchjob.errors import is_out_of_memory

__all__ = ["DeviceErrorKind", "classify_device_error"]

DeviceErrorKind = Literal["context", "hardware"]

# These texts are the CUDA runtime's own. Every library on top of CUDA repeats them; torch 2.11 to 2.15 raises them as
# torch.AcceleratorError or RuntimeError. HIP uses the same texts. After any of them the context is not usable.
_HARDWARE = re.compile(
    r"ECC error|ECCUncorrectable|NVLink error|NvlinkUncorrectable|over nvlink or a hardware error|hardware stack error"
    r"|fallen off the bus|GPU is lost|busy or unavailable"
    r"|(?:CUDA|HIP) error: unknown error",
    re.IGNORECASE,
)
_CONTEXT = re.compile(
    r"device-side assert triggered|illegal memory access|illegal address|illegal instruction|misaligned address"
    r"|invalid program counter|not supported on global/shared address space|unspecified launch failure"
    r"|launch timed out|context is destroyed|cudaError(?:Assert|IllegalAddress|LaunchFailure|LaunchTimeout)"
    r"|hsa_status_error_exception",
    re.IGNORECASE,
)


def classify_device_error(error: BaseException, device: torch.device | None = None) -> DeviceErrorKind | None:
    """Return the kind of device fault that an exception means, None if the device is not to blame.

    Args:
        error: Exception as it was raised; the exceptions that caused it count too.
        device: Device to probe if the texts do not decide; None does not probe.

    Returns:
        `hardware` if the device itself failed, `context` if this process can no longer use it, None if the device
        works as before.
    """
    errors = _cause_chain(error)
    texts = [str(one) for one in errors]
    if any(_HARDWARE.search(text) for text in texts):
        return "hardware"
    if any(_CONTEXT.search(text) for text in texts):
        return "context"
    if device is None or device.type != "cuda" or any(is_out_of_memory(one) for one in errors):
        return None
    return _probe(device)


def _probe(device: torch.device) -> DeviceErrorKind | None:
    """Synchronise with the device; on a broken context every call raises its error."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return "hardware" if _HARDWARE.search(str(error)) else "context"
    return None


def _cause_chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain
