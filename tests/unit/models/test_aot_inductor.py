"""Packages compiled by AOTInductor: the machine and the device they run on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from batchjob.errors import InvalidJob
from batchjob.inference.devices import pick_device
from batchjob.models.exported import ExportedModel
from batchjob.models.loaded_model import LoadedModel
from batchjob.storage.reader import Reader
from tests.support.saved_models import FORMATS, SavedModel, catch_load_error, make_pixels, repack_archive, with_trust

READER = Reader()
PIXELS = make_pixels(8)


def load(file: Path) -> LoadedModel:
    return ExportedModel.model_validate(with_trust({"weights": str(file)}, file)).load(READER, file.parent)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> SavedModel:
    """Package for the CPU of this machine."""
    if requirement := FORMATS["exported-aoti"].missing_requirement():
        pytest.skip(requirement)
    return FORMATS["exported-aoti"].save(tmp_path_factory.mktemp("aoti"), 1)


def change_metadata(package: SavedModel, file: Path, **metadata: str) -> Path:
    assert package.file is not None
    return repack_archive(
        package.file, file, "metadata.json", lambda data: json.dumps({**json.loads(data), **metadata}).encode()
    )


def test_package_runs_on_its_device(package: SavedModel) -> None:
    assert package.file is not None
    loaded = load(package.file)
    assert (loaded.devices, loaded.eager, loaded.batch_size) == (("cpu",), False, None)
    with pytest.raises(InvalidJob, match=r"takes \[any, 3, 16, 16\] and got \[2, 3, 16, 20\]"):
        loaded.module(torch.zeros(2, 3, 16, 20))
    channels_last = PIXELS.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(loaded.module(channels_last), loaded.module(PIXELS), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"AOTI_MACHINE": "riscv64"}, "was compiled for riscv64, not "),
        ({"AOTI_PLATFORM": "plan9"}, "was compiled for plan9, not "),
    ],
)
def test_package_for_another_machine_is_refused(
    metadata: dict[str, str], message: str, package: SavedModel, tmp_path: Path
) -> None:
    assert message in catch_load_error(load, change_metadata(package, tmp_path / "net.pt2", **metadata))


def test_package_for_a_processor_with_more_instructions_is_refused(
    package: SavedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_f": False})
    file = change_metadata(package, tmp_path / "net.pt2", AOTI_CPU_ISA="AVX512")
    assert "was compiled for AVX512, which this processor lacks" in catch_load_error(load, file)


def test_package_for_an_absent_gpu_is_refused(package: SavedModel, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    loaded = load(change_metadata(package, tmp_path / "net.pt2", AOTI_DEVICE_KEY="cuda"))
    assert loaded.devices == ("cuda",)
    with pytest.raises(InvalidJob, match="it runs on cuda only, which is not there"):
        pick_device("auto", loaded.devices)
    with pytest.raises(InvalidJob, match="was compiled for cuda and cannot run on cpu"):
        loaded.module(PIXELS)


def test_broken_package_is_refused(package: SavedModel, tmp_path: Path) -> None:
    assert package.file is not None
    for suffix, message in (
        ("metadata.json", "is no whole AOTInductor package"),
        (".so", "that this torch does not load"),
    ):
        broken = repack_archive(package.file, tmp_path / "net.pt2", suffix, lambda data: data[:40])
        assert message in catch_load_error(load, broken)


def test_package_without_its_source_is_refused(package: SavedModel, tmp_path: Path) -> None:
    assert package.file is not None
    without_source = repack_archive(package.file, tmp_path / "net.pt2", ".wrapper.cpp", lambda data: b"")
    assert "brings no generated source that tells its inputs" in catch_load_error(load, without_source)
