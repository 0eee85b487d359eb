"""Choice of a device on machines with and without accelerators, and the names of devices."""

from __future__ import annotations

import platform
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from batchjob.errors import InvalidJob
from batchjob.inference.devices import (
    DeviceCapabilities,
    check_reserved_gpus,
    get_device_capabilities,
    identify_device,
    pick_device,
    pick_model_device,
)
from batchjob.job.runtime import Runtime


def set_devices(monkeypatch: pytest.MonkeyPatch, *kinds: str, gpus: int = 1, cuda_build: str | None = "13.2") -> None:
    """Make torch report these kinds of devices besides the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in kinds)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus if "cuda" in kinds else 0)
    monkeypatch.setattr(torch.version, "cuda", cuda_build)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: "xpu" in kinds)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in kinds)


@pytest.mark.parametrize(
    ("present", "supported", "expected"),
    [
        ((), None, "cpu"),
        (("mps",), None, "mps"),
        (("mps", "xpu"), None, "xpu"),
        (("mps", "xpu", "cuda"), None, "cuda"),
        (("cuda",), (), "cuda"),
        (("cuda",), ("cpu",), "cpu"),
        (("mps",), ("cpu", "cuda"), "cpu"),
        (("cuda",), ("cpu", "cuda"), "cuda"),
    ],
)
def test_auto_takes_the_first_device_that_the_model_supports(
    monkeypatch: pytest.MonkeyPatch, present: tuple[str, ...], supported: tuple[str, ...] | None, expected: str
) -> None:
    set_devices(monkeypatch, *present)
    assert pick_device("auto", supported) == torch.device(expected)


def test_auto_without_any_supported_device_names_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    set_devices(monkeypatch)
    with pytest.raises(InvalidJob, match="it runs on cuda or xpu only, which is not there"):
        pick_device("auto", ("cuda", "xpu"))


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:1"])
def test_named_gpu_is_used_as_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    set_devices(monkeypatch, "cuda", gpus=2)
    assert pick_device(name) == torch.device(name)


def test_gpu_beyond_the_last_one_is_refused_with_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    set_devices(monkeypatch, "cuda", gpus=2)
    with pytest.raises(InvalidJob, match=r"cuda:2 is not there, only cuda:0 to cuda:1"):
        pick_device("cuda:2")


@pytest.mark.parametrize(
    ("cuda_build", "reason"), [(None, "this torch is built without CUDA"), ("13.2", "no GPU or driver is visible")]
)
def test_absent_gpu_is_explained(monkeypatch: pytest.MonkeyPatch, cuda_build: str | None, reason: str) -> None:
    set_devices(monkeypatch, cuda_build=cuda_build)
    with pytest.raises(InvalidJob, match=rf"cuda is not there \({reason}\); write runtime\.device=auto or cpu"):
        pick_device("cuda")


@pytest.mark.parametrize("name", ["mps", "xpu"])
def test_absent_accelerator_is_never_replaced_by_a_gpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    set_devices(monkeypatch, "cuda")
    with pytest.raises(InvalidJob, match=rf"runtime\.device: {name} is not there"):
        pick_device(name)


def test_named_device_that_the_model_does_not_support_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_devices(monkeypatch, "cuda")
    with pytest.raises(InvalidJob, match="the model runs on cuda or xpu only, not on cpu; write auto"):
        pick_device("cpu", ("cuda", "xpu"))


@pytest.mark.parametrize("gpus_per_worker", [1, 0.5])
def test_requested_gpu_that_auto_does_not_find_is_refused(
    monkeypatch: pytest.MonkeyPatch, gpus_per_worker: float
) -> None:
    set_devices(monkeypatch)
    message = rf"gpus_per_worker asks for a GPU, but torch sees none on {re.escape(platform.node())} \("
    with pytest.raises(InvalidJob, match=message):
        pick_model_device(Runtime(gpus_per_worker=gpus_per_worker), None)


@pytest.mark.parametrize("reserved_gpus", [1.0, 0.25])
def test_reserved_gpu_that_torch_does_not_see_names_the_node(
    monkeypatch: pytest.MonkeyPatch, reserved_gpus: float
) -> None:
    set_devices(monkeypatch, cuda_build=None)
    message = (
        rf"Ray has reserved {reserved_gpus:g} GPU on {re.escape(platform.node())}, but torch sees none there "
        r"\(this torch is built without CUDA\)"
    )
    with pytest.raises(InvalidJob, match=message):
        pick_model_device(Runtime(), None, reserved_gpus)
    with pytest.raises(InvalidJob, match=message):
        check_reserved_gpus(Runtime(device="cuda:0"), reserved_gpus)


def test_reserved_gpu_that_torch_sees_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    set_devices(monkeypatch, "cuda")
    check_reserved_gpus(Runtime(device="cuda"), 1.0)
    assert pick_model_device(Runtime(), None, 1.0) == torch.device("cuda")


def test_model_for_cpus_only_is_said_to_be_that_in_place_of_a_gpu_that_is_not_visible(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_devices(monkeypatch, "cuda")
    with pytest.raises(InvalidJob, match=r"gpus_per_worker is 1.*, but the model runs on CPUs only; leave it out"):
        pick_model_device(Runtime(gpus_per_worker=1), ("cpu",))


def test_model_for_cpus_only_runs_on_a_node_whose_gpu_was_reserved_by_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    set_devices(monkeypatch, "cuda")
    assert pick_model_device(Runtime(), ("cpu",), 1.0) == torch.device("cpu")


@pytest.mark.parametrize(
    ("runtime", "present", "expected"),
    [
        (Runtime(), (), "cpu"),
        (Runtime(gpus_per_worker=0), (), "cpu"),
        (Runtime(gpus_per_worker=1), ("cuda",), "cuda"),
        (Runtime(gpus_per_worker=1, device="cpu"), ("cuda",), "cpu"),
    ],
)
def test_device_follows_the_runtime_settings(
    monkeypatch: pytest.MonkeyPatch, runtime: Runtime, present: tuple[str, ...], expected: str
) -> None:
    set_devices(monkeypatch, *present)
    assert pick_model_device(runtime, None) == torch.device(expected)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"cpu_name": "Xeon", "avx2": True, "avx512_f": False}, DeviceCapabilities("cpu Xeon avx2", "cpu")),
        (
            {"cpu_name": "Xeon", "avx2": True, "avx512_bf16": True},
            DeviceCapabilities("cpu Xeon avx2 avx512_bf16", "cpu", bf16=True),
        ),
        ({"cpu_name": "Xeon", "amx_bf16": True}, DeviceCapabilities("cpu Xeon amx_bf16", "cpu", bf16=True)),
        (
            {"architecture": "aarch64", "bf16": True, "sve": True},
            DeviceCapabilities("cpu aarch64 bf16 sve", "cpu", bf16=True),
        ),
        ({}, DeviceCapabilities(f"cpu {platform.machine()}", "cpu")),
    ],
)
def test_cpu_is_named_after_its_instruction_sets(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], expected: DeviceCapabilities
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    assert get_device_capabilities(torch.device("cpu")) == expected


def test_cpu_is_named_by_a_torch_that_lists_no_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert get_device_capabilities(torch.device("cpu")) == DeviceCapabilities(f"cpu {platform.machine()}", "cpu")


def test_gpus_of_one_model_are_told_apart_by_their_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    uuids = {"cuda:0": "1f2e", "cuda:1": "9a8b"}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="H100", uuid=uuids[str(device)])
    )
    names = [identify_device(torch.device(device)) for device in uuids]
    assert names == ["cuda:0 (H100, GPU-1f2e)", "cuda:1 (H100, GPU-9a8b)"]
