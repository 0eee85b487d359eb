"""Which device a worker computes on, and what that can do; a name that is asked for is never replaced."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchjob.errors import InvalidJob
from batchjob.inference.execution_config import Precision

if TYPE_CHECKING:
    import torch

__all__ = ["DeviceCapabilities", "check_precision", "get_device_capabilities", "pick_device"]

_TELLING = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16", "bf16", "sve")  # CPUs of one name may differ


@dataclass(frozen=True)
class DeviceCapabilities:
    """What a device can do, as far as candidates depend on it; `name` tells devices that differ apart."""

    name: str
    kind: str
    bf16: bool = False
    fp16: bool = False


def pick_device(name: str, supported: Sequence[str] | None = None) -> torch.device:
    """The device a job asks for. `auto` takes the first that is there of CUDA, XPU, MPS and the CPU.

    Args:
        name: auto, cpu, cuda, cuda:N, mps or xpu. ROCm is `cuda` to torch.
        among: types of device that the model runs on; None for all.

    Raises:
        InvalidJob: it is not there, not known, or not one the model runs on.
    """
    import torch

    if name == "auto":
        there = [
            kind for kind in ("cuda", "xpu", "mps", "cpu") if _is_there(kind) and (not supported or kind in supported)
        ]
        if not there:
            raise InvalidJob(
                f"model: it runs on {' or '.join(supported or ())} only, which is not there; give another file"
            )
        return torch.device(there[0])
    if not re.fullmatch(r"cpu|mps|xpu|cuda(:\d+)?", name):
        raise InvalidJob(f"runtime.device: {name!r} is not known; write auto, cpu, cuda, cuda:N, mps or xpu")
    device = torch.device(name)
    if device.type == "cuda":
        _check_cuda(device)
    elif not _is_there(device.type):
        raise InvalidJob(f"runtime.device: {device.type} is not there; write runtime.device=auto or cpu")
    if supported and device.type not in supported:
        raise InvalidJob(f"runtime.device: the model runs on {' or '.join(supported)} only, not on {name}; write auto")
    return device


def _is_there(kind: str) -> bool:
    import torch

    match kind:
        case "cuda":
            return torch.cuda.is_available()
        case "xpu":
            return torch.xpu.is_available()
        case "mps":
            return torch.backends.mps.is_available()
    return kind == "cpu"


def _check_cuda(device: torch.device) -> None:
    import torch

    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no GPU or driver is visible"
        raise InvalidJob(f"runtime.device: {device} is not there ({why}); write runtime.device=auto or cpu")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise InvalidJob(f"runtime.device: {device} is not there, only cuda:0 to cuda:{count - 1}")


def check_precision(precision: Precision, device: torch.device) -> None:
    """Raises InvalidJob where the device cannot compute in it."""
    if precision == "tf32" and device.type != "cuda":
        raise InvalidJob(f"runtime.precision: tf32 is for CUDA devices, this one is {device}; write fp32 or auto")


def get_device_capabilities(device: torch.device) -> DeviceCapabilities:
    """What a device can do, and the name that tells it from others of its type."""
    import torch

    if device.type == "cuda":
        with torch.cuda.device(device):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return DeviceCapabilities(torch.cuda.get_device_name(device), "cuda", bf16, fp16=True)
    if device.type == "cpu":
        able = getattr(torch.cpu, "get_capabilities", dict[str, Any])()  # torch 2.11 may not have it
        bf16 = bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16"))
        name = able.get("cpu_name") or able.get("architecture") or platform.machine()
        return DeviceCapabilities(" ".join(["cpu", name, *(flag for flag in _TELLING if able.get(flag))]), "cpu", bf16)
    return DeviceCapabilities(device.type, device.type)
