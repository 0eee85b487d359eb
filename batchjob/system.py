"""What a bug report needs to know of this machine: versions, devices, cores, memory, Ray. No secrets, no hosts."""

from __future__ import annotations

import importlib
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from batchjob.errors import InvalidJob

__all__ = [
    "available_cores",
    "available_memory",
    "cgroup_cpu_quota",
    "cgroup_memory_limit",
    "collect_environment",
    "format_environment",
    "free_shared_memory",
    "import_torchvision",
    "require_packages",
]

PACKAGES = (
    "batchjob",
    "torch",
    "torchvision",
    "ray",
    "pyarrow",
    "obstore",
    "fsspec",
    "pydantic",
    "pillow",
    "numpy",
    "safetensors",
    "s3fs",
    "boto3",
    "gcsfs",
    "adlfs",
)
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # looked at, never written
# Asked in a process of its own: a broken driver may crash or hang whoever loads it.
_ASK_DEVICES = """
import json, torch
devices = []
for i in range(torch.cuda.device_count()):
    p = torch.cuda.get_device_properties(i)
    devices.append(f"cuda:{i} {p.name}, {p.total_memory / 2**30:.0f} GiB, capability {p.major}.{p.minor}")
if torch.backends.mps.is_available():
    devices.append("mps")
print(json.dumps({"devices": devices, "cuda_build": torch.version.cuda, "threads": torch.get_num_threads(),
                  "cpu": torch.backends.cpu.get_cpu_capability()}))
"""


def collect_environment() -> dict[str, Any]:
    """Everything, JSON-able. Sizes in bytes; None where this machine does not say. Takes seconds: torch is asked."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cores": {"machine": os.cpu_count(), "allowed": _affinity(), "quota": cgroup_cpu_quota()},
        "memory": {"machine": _memory(), "limit": cgroup_memory_limit()},
        "shared_memory": _shared_memory(),
        "torch": _torch(),
        "ray": {"address_given": bool(os.environ.get("RAY_ADDRESS")), "inside_ray_job": "RAY_JOB_ID" in os.environ},
    }


def format_environment(environment: Mapping[str, Any]) -> list[str]:
    """The facts, a line each, for a person."""
    packages = environment["packages"]
    torch: Mapping[str, Any] = environment["torch"]
    cores, memory = environment["cores"], environment["memory"]
    return [
        f"python         {environment['python']} on {environment['platform']}",
        *(f"{name:<14} {version or 'not installed'}" for name, version in packages.items()),
        f"cores          {cores['machine']} here, {cores['allowed']} allowed, quota {cores['quota'] or 'none'}",
        f"memory         {_size(memory['machine'])}, limit {_size(memory['limit'], 'none')}",
        f"shared memory  {_size(environment['shared_memory'])}",
        f"devices        {', '.join(torch.get('devices', [])) or 'cpu only'}",
        f"torch build    CUDA {torch.get('cuda_build') or 'none'}, {torch.get('cpu', '?')}",
        f"torch threads  {torch.get('threads', '?')}",
        *([f"torch          {torch['error']}"] if "error" in torch else []),
        f"RAY_ADDRESS    {'set' if environment['ray']['address_given'] else 'not set'}",
    ]


def available_cores() -> int:
    """Whole cores that this process may really use: affinity and control group, at least one."""
    return max(1, int(min(_affinity() or 1, cgroup_cpu_quota() or math.inf)))


def cgroup_cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores that the control group really gives, the tightest of its ancestors; None where it sets no bound."""
    found: list[float] = []
    for folder in _groups(root, "cpu"):
        words = _words(folder / "cpu.max")
        if len(words) == 2 and words[0] != "max":
            found.append(int(words[0]) / int(words[1]))
        quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
        if quota and period and int(quota[0]) > 0:
            found.append(int(quota[0]) / int(period[0]))
    return min(found, default=None)


def cgroup_memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes that the control group really gives; None where it sets no bound."""
    found: list[int] = []
    for folder in _groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            words = _words(folder / name)
            # Version 1 says "no bound" as a number near 2**63.
            if words and words[0] != "max" and int(words[0]) < 1 << 60:
                found.append(int(words[0]))
    return min(found, default=None)


def available_memory() -> int | None:
    """Bytes that this process and its children may use: the machine's, or what the control group gives of them."""
    return min((size for size in (_memory(), cgroup_memory_limit()) if size is not None), default=None)


def free_shared_memory() -> int | None:
    """Bytes of shared memory that nobody has taken; None where that is not known."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control group and its ancestors, version 2 or 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        group = top / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _affinity() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _shared_memory() -> int | None:
    return shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else None


def _torch() -> dict[str, Any]:
    import json

    try:
        command = [sys.executable, "-c", _ASK_DEVICES]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return {"error": "did not answer within 120 s"}
    if asked.returncode != 0:
        last = (asked.stderr.strip().splitlines() or [f"ended with {asked.returncode}"])[-1]
        return {"error": f"cannot be loaded: {last}"}
    answer: dict[str, Any] = json.loads(asked.stdout.strip().splitlines()[-1])
    return answer


def _size(size: int | None, unknown: str = "unknown") -> str:
    return unknown if size is None else f"{size / (1 << 30):.1f} GiB"


_COMPILER = ("torch._dynamo", "torch._dynamo.utils")


def import_torchvision() -> None:
    """Import torchvision, once a process, before whoever else does.

    `torchvision.ops` imports all of `torch._dynamo` for one function, which it calls where regions of interest are
    aligned deterministically. A stand-in takes that name meanwhile; what is asked of it is answered by the real one.
    """
    importlib.import_module("torch")
    if "torchvision" in sys.modules or _COMPILER[0] in sys.modules:
        return
    sys.modules.update({name: _LazyModule(name) for name in _COMPILER})
    try:
        importlib.import_module("torchvision")
    finally:
        _step_aside()


class _LazyModule(ModuleType):
    """A module that is imported when something in it is used, and not when it is named."""

    __path__: list[str] = []  # noqa: RUF012 - as of a package, so that the import system looks for submodules

    def is_compile_supported(self, device_type: str) -> bool:
        """What torchvision takes from there."""
        return bool(_real(self.__name__).is_compile_supported(device_type))

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # the import system's own questions
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


def _real(name: str) -> ModuleType:
    _step_aside()
    return importlib.import_module(name)


def _step_aside() -> None:
    for name in _COMPILER:
        if isinstance(sys.modules.get(name), _LazyModule):
            del sys.modules[name]


def require_packages(model_type: str, extra: str, *packages: str) -> None:
    """Raises InvalidJob where a package is missing that `model.type: kind` needs; imports none of them."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise InvalidJob(f"model.type: {model_type} needs {' and '.join(missing)}; pip install 'batchjob[{extra}]'")
