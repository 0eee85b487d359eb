"""Cores, memory and shared memory that this process may use; optional packages; the report of `batchjob env`."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from batchjob.errors import InvalidJob

__all__ = [
    "SHARED_MEMORY",
    "available_cores",
    "available_memory",
    "cgroup_cpu_quota",
    "cgroup_memory_limit",
    "collect_environment",
    "format_environment",
    "free_shared_memory",
    "install_command",
    "is_shared_memory_writable",
    "require_packages",
    "working_directory",
]

_PACKAGES = (
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
    "simplejpeg",
)
# Extras of batchjob that bring what a job may need; the others are for development.
_JOB_EXTRAS = ("s3", "gcs", "azure", "timm", "hf", "onnx", "quant", "heif", "query")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - its size is read, nothing is written
# Run in a process of its own: a broken driver may crash or hang the process that loads it.
_DEVICE_QUERY = """
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
    """Collect the values that a bug report needs, ready for JSON, without secrets and host names.

    Sizes are in bytes; None is a value that this machine does not tell. It takes seconds, because torch is imported in
    a process of its own.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _package_version(name) for name in _PACKAGES},
        "optional_packages": {
            extra: {_package_name(text): _package_version(_package_name(text)) for text in requirements}
            for extra in _JOB_EXTRAS
            if (requirements := _extra_requirements(extra))
        },
        "cores": {"machine": os.cpu_count(), "allowed": _affinity_cores(), "quota": cgroup_cpu_quota()},
        "memory": {"machine": _machine_memory(), "limit": cgroup_memory_limit()},
        "shared_memory": shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else None,
        "torch": _query_torch(),
        "ray": {"address_given": bool(os.environ.get("RAY_ADDRESS")), "inside_ray_job": "RAY_JOB_ID" in os.environ},
    }


def format_environment(environment: Mapping[str, Any]) -> list[str]:
    """Return the lines of `batchjob env` for people, from `collect_environment`."""
    packages = environment["packages"]
    torch: Mapping[str, Any] = environment["torch"]
    cores, memory = environment["cores"], environment["memory"]
    return [
        f"python         {environment['python']} on {environment['platform']}",
        *(f"{name:<14} {version or 'not installed'}" for name, version in packages.items()),
        *(_format_extra(extra, found) for extra, found in environment["optional_packages"].items()),
        f"cores          {cores['machine']} here, {cores['allowed']} allowed, quota {cores['quota'] or 'none'}",
        f"memory         {_format_size(memory['machine'])}, limit {_format_size(memory['limit'], 'none')}",
        f"shared memory  {_format_size(environment['shared_memory'])}",
        f"devices        {', '.join(torch.get('devices', [])) or 'cpu only'}",
        f"torch build    CUDA {torch.get('cuda_build') or 'none'}, {torch.get('cpu', '?')}",
        f"torch threads  {torch.get('threads', '?')}",
        *([f"torch          {torch['error']}"] if "error" in torch else []),
        f"RAY_ADDRESS    {'set' if environment['ray']['address_given'] else 'not set'}",
    ]


def available_cores() -> int:
    """Return the whole cores that this process may use, by its affinity and its control group; at least one."""
    return max(1, int(min(_affinity_cores() or 1, cgroup_cpu_quota() or math.inf)))


def cgroup_cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the cores that the control group and its ancestors allow; None if they set no limit."""
    quotas: list[float] = []
    for folder in _cgroup_folders(root, "cpu"):
        # Version 2: one file with quota and period, such as `150000 100000`.
        words = _read_words(folder / "cpu.max")
        if len(words) == 2 and words[0] != "max":
            quotas.append(int(words[0]) / int(words[1]))
        # Version 1: a file for each of them.
        quota, period = _read_words(folder / "cpu.cfs_quota_us"), _read_words(folder / "cpu.cfs_period_us")
        if quota and period and int(quota[0]) > 0:
            quotas.append(int(quota[0]) / int(period[0]))
    return min(quotas, default=None)


def cgroup_memory_limit(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory that the control group and its ancestors allow; None if they set no limit."""
    limits: list[int] = []
    for folder in _cgroup_folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            words = _read_words(folder / name)
            # In version 1, no limit is a number near 2**63.
            if words and words[0] != "max" and int(words[0]) < 1 << 60:
                limits.append(int(words[0]))
    return min(limits, default=None)


def available_memory() -> int | None:
    """Return the bytes of memory that this process and its children may use; None if unknown."""
    return min((size for size in (_machine_memory(), cgroup_memory_limit()) if size is not None), default=None)


def free_shared_memory() -> int | None:
    """Return the free bytes of shared memory; None if unknown."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None


def working_directory() -> Path:
    """Return the working directory of this process.

    Raises:
        InvalidJob: It has been deleted.
    """
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise InvalidJob(
            "the working directory of this process has been deleted; cd into a folder that is there and run again"
        ) from None


def is_shared_memory_writable() -> bool:
    """Return False if shared memory is there and read-only, as in some hardened containers."""
    return not SHARED_MEMORY.is_dir() or os.access(SHARED_MEMORY, os.W_OK)


def require_packages(*packages: str, model_type: str, extra: str) -> None:
    """Raise InvalidJob if a package that a model type needs is not installed; imports none of them.

    Args:
        packages: Import names of the packages.
        model_type: `model.type` of the job.
        extra: Extra of batchjob that installs the packages.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise InvalidJob(f"model.type: {model_type} needs {' and '.join(missing)}; {install_command(extra)}")


def install_command(extra: str, *packages: str) -> str:
    """Return the shell command that installs packages into this environment.

    Args:
        extra: Extra of batchjob, whose packages are installed.
        packages: Packages to install if the extra is unknown, as where batchjob itself is not installed.
    """
    requirements = _extra_requirements(extra) or packages or (f"batchjob[{extra}]",)
    # An environment of uv has no pip. It is not asked for by `find_spec`, at which setuptools replaces distutils.
    installer = "pip" if _package_version("pip") else "uv pip"
    return shlex.join([*installer.split(), "install", *requirements])


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control group and its ancestors, in version 2 or 1.

    Example: the line `0::/jobs/7` of /proc/self/cgroup gives /sys/fs/cgroup/jobs/7, /sys/fs/cgroup/jobs and
    /sys/fs/cgroup.
    """
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


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _extra_requirements(extra: str) -> tuple[str, ...]:
    """Return the requirements of an extra, such as `timm>=1.0.15`; none if the extra is unknown."""
    try:
        requirements = importlib.metadata.requires("batchjob") or []
    except importlib.metadata.PackageNotFoundError:
        return ()
    split = (text.partition(";") for text in requirements)
    return tuple(text.strip() for text, _, marker in split if re.fullmatch(rf"extra == .{extra}.", marker.strip()))


def _package_name(requirement: str) -> str:
    """Return the name in a requirement: `timm` of `timm>=1.0.15`."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def _format_extra(extra: str, versions: Mapping[str, str | None]) -> str:
    found = ", ".join(f"{name} {version}" if version else f"no {name}" for name, version in versions.items())
    return f"{extra:<14} {found} (optional)"


def _package_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _affinity_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _machine_memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _query_torch() -> dict[str, Any]:
    try:
        command = [sys.executable, "-c", _DEVICE_QUERY]
        query = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return {"error": "did not answer within 120 s"}
    if query.returncode != 0:
        last = (query.stderr.strip().splitlines() or [f"ended with {query.returncode}"])[-1]
        return {"error": f"cannot be loaded: {last}"}
    answer: dict[str, Any] = json.loads(query.stdout.strip().splitlines()[-1])
    return answer


def _format_size(size: int | None, unknown: str = "unknown") -> str:
    return unknown if size is None else f"{size / (1 << 30):.1f} GiB"
