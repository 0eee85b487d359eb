"""Choice of the device a model runs on, and its capabilities. A device that the job names is never replaced."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from batchjob.errors import InvalidJob
from batchjob.inference.execution_config import Precision
from batchjob.job.runtime import Runtime

__all__ = [
    "DeviceCapabilities",
    "check_precision",
    "check_reserved_gpus",
    "get_device_capabilities",
    "identify_device",
    "pick_device",
    "pick_model_device",
]

# Instruction sets that are part of a CPU's name, because CPUs with the same name may differ in them.
_INSTRUCTION_SETS = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16", "bf16", "sve")


@dataclass(frozen=True)
class DeviceCapabilities:
    """Capabilities of a device on which the choice of an execution config depends.

    Attributes:
        name: Name that differs for devices with different capabilities; part of the key of stored tuning decisions.
        kind: Type of the device in torch: `cpu`, `cuda`, `mps` or `xpu`.
        bf16: The device computes in bfloat16 in hardware.
        fp16: The device computes in float16 in hardware.
    """

    name: str
    kind: str
    bf16: bool = False
    fp16: bool = False


def pick_device(name: str, supported: Sequence[str] | None = None) -> torch.device:
    """Return the device that a job asks for; `auto` takes the first available of CUDA, XPU, MPS and the CPU.

    Args:
        name: auto, cpu, cuda, cuda:N, mps or xpu. ROCm devices are `cuda` in torch.
        supported: Types of device on which the model runs; None for all.

    Raises:
        InvalidJob: The device is not available, its name is unknown, or the model does not run on it.
    """
    if name == "auto":
        kinds = [kind for kind in ("cuda", "xpu", "mps", "cpu") if not supported or kind in supported]
        available = next((kind for kind in kinds if _is_available(kind)), None)
        if available is None:
            raise InvalidJob(
                f"model: it runs on {' or '.join(supported or ())} only, which is not there; give another file"
            )
        return torch.device(available)
    if not re.fullmatch(r"cpu|mps|xpu|cuda(:\d+)?", name):
        raise InvalidJob(f"runtime.device: {name!r} is not known; write auto, cpu, cuda, cuda:N, mps or xpu")
    device = torch.device(name)
    if device.type == "cuda":
        _check_cuda(device)
    elif not _is_available(device.type):
        raise InvalidJob(f"runtime.device: {device.type} is not there; write runtime.device=auto or cpu")
    if supported and device.type not in supported:
        raise InvalidJob(f"runtime.device: the model runs on {' or '.join(supported)} only, not on {name}; write auto")
    return device


def pick_model_device(runtime: Runtime, supported: Sequence[str] | None, reserved_gpus: float = 0.0) -> torch.device:
    """Return the device for a loaded model.

    Args:
        runtime: The job's settings.
        supported: Types of device on which the model runs; None for all.
        reserved_gpus: GPUs that the pool has reserved for this process.

    Raises:
        InvalidJob: See `pick_device`; or a GPU is asked for or reserved and `auto` finds none, which must not end in a
            silent computation on the CPU.
    """
    device = pick_device(runtime.device, supported)
    if device.type != "cpu" or runtime.device != "auto":
        return device
    asks_for_gpu = runtime.gpus_per_worker not in {"auto", 0}
    if supported and set(supported) == {"cpu"}:
        if asks_for_gpu:
            raise InvalidJob(
                f"runtime.gpus_per_worker is {runtime.gpus_per_worker}, but the model runs on CPUs only; leave it out, "
                "or write runtime.device=cpu"
            )
        return device
    if asks_for_gpu or reserved_gpus:
        raise _invisible_gpu_error(reserved_gpus)
    return device


def check_reserved_gpus(runtime: Runtime, reserved_gpus: float) -> None:
    """Check that torch sees the GPU that the pool has reserved for this process, if the job names it.

    Raises:
        InvalidJob: It sees none.
    """
    if reserved_gpus and runtime.device.startswith("cuda") and not torch.cuda.is_available():
        raise _invisible_gpu_error(reserved_gpus)


def _invisible_gpu_error(reserved_gpus: float) -> InvalidJob:
    why = "this torch is built without CUDA" if torch.version.cuda is None else "no driver that fits torch is there"
    if not reserved_gpus:
        return InvalidJob(
            f"runtime.gpus_per_worker asks for a GPU, but torch sees none on {platform.node()} ({why}); leave it out "
            "to compute on the CPU"
        )
    return InvalidJob(
        f"Ray has reserved {reserved_gpus:g} GPU{'' if reserved_gpus <= 1 else 's'} on {platform.node()}, but torch "
        f"sees none there ({why}); look at the driver and torch on that node (`batchjob env`), or write "
        "runtime.device=cpu"
    )


def check_precision(precision: Precision, device: torch.device) -> None:
    """Raise InvalidJob if the device cannot compute in this precision."""
    if precision == "tf32" and device.type != "cuda":
        raise InvalidJob(f"runtime.precision: tf32 is for CUDA devices, this one is {device}; write fp32 or auto")


def get_device_capabilities(device: torch.device) -> DeviceCapabilities:
    """Return the capabilities of a device, with the name that tells it from others of its type."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return DeviceCapabilities(torch.cuda.get_device_name(device), "cuda", bf16, fp16=True)
    if device.type == "cpu":
        # torch 2.11 may not have this function.
        flags = getattr(torch.cpu, "get_capabilities", dict[str, Any])()
        bf16 = bool(flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("bf16"))
        name = flags.get("cpu_name") or flags.get("architecture") or platform.machine()
        sets = [flag for flag in _INSTRUCTION_SETS if flags.get(flag)]
        return DeviceCapabilities(" ".join(["cpu", name, *sets]), "cpu", bf16)
    return DeviceCapabilities(device.type, device.type)


def identify_device(device: torch.device) -> str:
    """Return a name that is the same for this device in all processes of its machine: with the UUID of a GPU."""
    if device.type != "cuda":
        return str(device)
    properties = torch.cuda.get_device_properties(device)
    return f"{device} ({properties.name}, GPU-{getattr(properties, 'uuid', 'unknown')})"


def _is_available(kind: str) -> bool:
    match kind:
        case "cuda":
            return torch.cuda.is_available()
        case "xpu":
            return torch.xpu.is_available()
        case "mps":
            return torch.backends.mps.is_available()
    return kind == "cpu"


def _check_cuda(device: torch.device) -> None:
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no GPU or driver is visible"
        raise InvalidJob(f"runtime.device: {device} is not there ({why}); write runtime.device=auto or cpu")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise InvalidJob(f"runtime.device: {device} is not there, only cuda:0 to cuda:{count - 1}")
