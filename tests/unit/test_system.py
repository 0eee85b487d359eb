"""Limits of cores and memory, missing packages, and the report of `batchjob env`."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from batchjob import system
from batchjob.errors import InvalidJob
from batchjob.system import (
    available_cores,
    available_memory,
    cgroup_cpu_quota,
    cgroup_memory_limit,
    collect_environment,
    format_environment,
    install_command,
    require_packages,
)

GIB = 1 << 30


def write_root(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        pytest.param(
            {
                "proc/self/cgroup": "0::/jobs/7\n",
                "sys/fs/cgroup/jobs/7/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/jobs/cpu.max": "50000 100000\n",  # 0.5 cores for all jobs together
            },
            0.5,
            id="lowest of the ancestors",
        ),
        pytest.param(
            {
                # In a container of version 1 the path is that of the host, and its limits lie at the top.
                "proc/self/cgroup": "4:cpuacct,cpu:/docker/f00\n1:name=systemd:/docker/f00\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2.5,
            id="container of version 1",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "4:cpu:/x\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
            },
            None,
            id="version 1 without a quota",
        ),
        pytest.param(
            {
                # Both versions are mounted; the controller is in version 1.
                "proc/self/cgroup": "4:cpu:/x\n0::/y\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
            },
            3.0,
            id="both versions",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/ab/cpu.max": "1000 1000\n"}, None, id="another group"
        ),
    ],
)
def test_cpu_quota_is_read_from_the_control_group(tmp_path: Path, files: dict[str, str], cores: float | None) -> None:
    assert cgroup_cpu_quota(write_root(tmp_path, files)) == cores


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        pytest.param(
            {
                "proc/self/cgroup": "0::/jobs/7\n",
                "sys/fs/cgroup/jobs/7/memory.max": f"{8 * GIB}\n",
                "sys/fs/cgroup/jobs/memory.max": f"{4 * GIB}\n",
            },
            4 * GIB,
            id="lowest of the ancestors",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "9:memory:/docker/f00\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
            },
            2 * GIB,
            id="container of version 1",
        ),
        pytest.param(
            {"proc/self/cgroup": "4:cpu:/x\n", "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "1024\n"},
            None,
            id="another controller",
        ),
    ],
)
def test_memory_limit_is_read_from_the_control_group(tmp_path: Path, files: dict[str, str], limit: int | None) -> None:
    assert cgroup_memory_limit(write_root(tmp_path, files)) == limit


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_cores_outside_the_affinity_are_not_available() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_memory_is_at_most_that_of_the_machine() -> None:
    memory = available_memory()
    assert memory is not None
    assert 0 < memory <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# -- packages --------------------------------------------------------------------------------------------------


def test_missing_packages_are_named_with_a_command_that_installs_them() -> None:
    with pytest.raises(InvalidJob) as caught:
        require_packages("no_such_a", "json", "no_such_b", model_type="onnx", extra="onnx")
    assert caught.value.message.startswith("model.type: onnx needs no_such_a and no_such_b; ")
    assert caught.value.message.endswith(install_command("onnx"))


@pytest.mark.parametrize(("has_pip", "installer"), [(True, ["pip"]), (False, ["uv", "pip"])])
def test_install_command_names_the_packages_of_an_extra(
    monkeypatch: pytest.MonkeyPatch, has_pip: bool, installer: list[str]
) -> None:
    monkeypatch.setattr(system, "_package_version", lambda name: "26.0" if has_pip else None)
    words = shlex.split(install_command("azure"))
    assert words[: len(installer) + 1] == [*installer, "install"]
    assert [re.split("[<>=]", word)[0] for word in words[len(installer) + 1 :]] == ["adlfs", "azure-identity"]


def test_install_command_without_an_installed_batchjob_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert install_command("heif", "pillow-heif").endswith(" install pillow-heif")
    assert install_command("timm").endswith(" install 'batchjob[timm]'")


def test_required_package_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "batchjob_test_heavy.py").write_text("raise ImportError('a broken driver')\n")
    monkeypatch.syspath_prepend(tmp_path)
    require_packages("batchjob_test_heavy", model_type="onnx", extra="onnx")
    assert "batchjob_test_heavy" not in sys.modules


# -- the report ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("torch_source", "error"),
    [
        (
            "raise ImportError('libcudart.so.13: cannot open')",
            "cannot be loaded: ImportError: libcudart.so.13: cannot open",
        ),
        ("import os; os.abort()", "cannot be loaded: ended with -6"),
    ],
)
def test_torch_that_breaks_its_process_is_part_of_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch_source: str, error: str
) -> None:
    (tmp_path / "torch.py").write_text(torch_source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    environment = collect_environment()
    assert environment["torch"] == {"error": error}
    assert f"torch          {error}" in format_environment(environment)


def make_environment(**changed: Any) -> dict[str, Any]:
    environment = {
        "python": "3.11.9",
        "platform": "Linux-6.1",
        "packages": {"torch": "2.15.0", "numpy": None},
        "optional_packages": {"s3": {"boto3": "1.40.0", "s3fs": None}, "timm": {"timm": "1.0.15"}},
        "cores": {"machine": 64, "allowed": 8, "quota": 2.5},
        "memory": {"machine": 96 * GIB, "limit": 12 * GIB},
        "shared_memory": GIB // 2,
        "torch": {"devices": ["cuda:0 H100", "cuda:1 H100"], "cuda_build": "13.2", "threads": 4, "cpu": "AVX512"},
        "ray": {"address_given": True, "inside_ray_job": False},
    }
    return environment | changed


def test_report_for_people_has_one_line_for_each_value() -> None:
    assert format_environment(make_environment()) == [
        "python         3.11.9 on Linux-6.1",
        "torch          2.15.0",
        "numpy          not installed",
        "s3             boto3 1.40.0, no s3fs (optional)",
        "timm           timm 1.0.15 (optional)",
        "cores          64 here, 8 allowed, quota 2.5",
        "memory         96.0 GiB, limit 12.0 GiB",
        "shared memory  0.5 GiB",
        "devices        cuda:0 H100, cuda:1 H100",
        "torch build    CUDA 13.2, AVX512",
        "torch threads  4",
        "RAY_ADDRESS    set",
    ]


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"cores": {"machine": 4, "allowed": 4, "quota": None}}, "cores          4 here, 4 allowed, quota none"),
        ({"memory": {"machine": None, "limit": None}}, "memory         unknown, limit none"),
        ({"shared_memory": None}, "shared memory  unknown"),
        ({"torch": {"devices": [], "cuda_build": None, "cpu": "AVX2", "threads": 2}}, "devices        cpu only"),
        ({"torch": {"error": "did not answer within 120 s"}}, "torch build    CUDA none, ?"),
        ({"ray": {"address_given": False}}, "RAY_ADDRESS    not set"),
    ],
)
def test_unknown_and_absent_values_are_shown_as_words(changed: dict[str, Any], line: str) -> None:
    assert line in format_environment(make_environment(**changed))
