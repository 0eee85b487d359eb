"""Whether an exception says that a device is broken, or what a process has of it; all else there fails then too."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from batchjob.errors import is_out_of_memory

if TYPE_CHECKING:
    import torch

__all__ = ["DeviceErrorKind", "classify_device_error", "identify_device"]

DeviceErrorKind = Literal["context", "hardware"]
# The words are the CUDA runtime's own, in which every library on top of it repeats them, from torch 2.11 to 2.15 as
# torch.AcceleratorError or RuntimeError; those of HIP are the same. None of these errors leaves a context that works.
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
    """What is broken, `hardware` where that is certain; None where the device can be used as before.

    Args:
        error: what was raised; what it was raised from counts too.
        device: asked whether it still works, where the words leave that open.
    """
    texts = [str(found) for found in _chain(error)]
    if any(_HARDWARE.search(text) for text in texts):
        return "hardware"
    if any(_CONTEXT.search(text) for text in texts):
        return "context"
    if device is None or device.type != "cuda" or any(is_out_of_memory(found) for found in _chain(error)):
        return None
    return _asked(device)


def identify_device(device: torch.device) -> str:
    """The device's name, by which it is known again in another process of its machine."""
    import torch

    if device.type != "cuda":
        return str(device)
    found = torch.cuda.get_device_properties(device)
    return f"{device} ({found.name}, GPU-{getattr(found, 'uuid', 'unknown')})"


def _asked(device: torch.device) -> DeviceErrorKind | None:
    """A broken context says so whatever it is asked."""
    import torch

    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return "hardware" if _HARDWARE.search(str(error)) else "context"
    return None


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found
