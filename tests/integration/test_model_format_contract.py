"""Contract of model formats: one suite over all of them, then one over those whose file is code."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter

from batchjob.errors import InvalidJob
from batchjob.inference.devices import pick_device
from batchjob.job.job import AnyModel
from batchjob.models.loaded_model import LoadedModel
from batchjob.preprocessing.normalize import Normalizer
from batchjob.preprocessing.settings import DecodeSettings, merge_preprocess
from batchjob.preprocessing.transforms import ImageTransform, ResizeCrop
from batchjob.storage.reader import Reader
from tests.support.saved_models import FORMATS, SavedModel, make_pixels, run_in_batches, with_trust
from tests.support.seaweed import Seaweed

READER = Reader()
MODEL: TypeAdapter[Any] = TypeAdapter(AnyModel)
CODE_FORMATS = [name for name in FORMATS if FORMATS[name].is_code]
# Formats of one file. `huggingface` is a folder, with tests of its own.
FILE_FORMATS = [name for name in FORMATS if name not in {"python", "huggingface"}]

SaveModel = Callable[..., SavedModel]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SaveModel:
    """Function `saved(name, seed=1)`: the model of a format, saved once for all tests, none of which changes it."""
    models: dict[tuple[str, int], SavedModel] = {}

    def save(name: str, seed: int = 1) -> SavedModel:
        if requirement := FORMATS[name].missing_requirement():
            pytest.skip(requirement)
        if (name, seed) not in models:
            models[name, seed] = FORMATS[name].save(tmp_path_factory.mktemp(name), seed)
        return models[name, seed]

    return save


def make_settings(model: SavedModel, **other: Any) -> Any:
    return MODEL.validate_python({**model.settings, **other})


def load(model: SavedModel, **other: Any) -> LoadedModel:
    loaded: LoadedModel = make_settings(model, **other).load(READER, model.folder)
    return loaded


# ------------------------------------------------------------------------------------------------------ every format


@pytest.mark.parametrize("name", FORMATS)
def test_output_equals_plain_pytorch_for_any_batch_size(name: str, saved: SaveModel) -> None:
    model = saved(name)
    loaded = load(model)
    pixels = make_pixels(17, model.side)
    with torch.inference_mode():
        expected = model.reference(pixels)
    output = run_in_batches(loaded.module, pixels, loaded.batch_size)
    torch.testing.assert_close(output, expected, rtol=0, atol=model.tolerance)
    for count in (1, 8):
        batches = [run_in_batches(loaded.module, batch, loaded.batch_size) for batch in pixels.split(count)]
        torch.testing.assert_close(torch.cat(batches), output, rtol=0, atol=model.tolerance)


@pytest.mark.parametrize("name", FORMATS)
def test_module_is_in_eval_mode_on_the_cpu_without_gradients(name: str, saved: SaveModel) -> None:
    loaded = load(saved(name))
    assert not any(module.training for module in loaded.module.modules())
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())
    tensors = [*loaded.module.parameters(), *loaded.module.buffers()]
    assert {tensor.device.type for tensor in tensors} <= {"cpu"}


@pytest.mark.parametrize("name", FORMATS)
def test_digest_changes_with_the_weights(name: str, saved: SaveModel) -> None:
    digest = load(saved(name)).digest
    assert digest == load(saved(name)).digest
    assert len(bytes.fromhex(digest)) == 32
    if FORMATS[name].seeds > 1:
        assert digest != load(saved(name, 2)).digest


@pytest.mark.parametrize("name", FILE_FORMATS)
def test_file_loads_from_any_storage(name: str, saved: SaveModel, s3: Seaweed) -> None:
    model = saved(name)
    assert model.file is not None
    bucket, memory = s3.bucket(), f"memory://contract/{name}/{model.file.name}"
    s3.put(bucket + model.file.name, model.file)
    with fsspec.open(memory, "wb") as file:
        file.write(model.file.read_bytes())
    local = load(model)
    for weights in (f"file://{model.file}", memory, bucket + model.file.name):
        make_settings(model, weights=weights).check(READER, model.folder)
        loaded = load(model, weights=weights)
        assert loaded.digest == local.digest
        pixels = make_pixels(4, model.side)
        output, expected = (run_in_batches(each.module, pixels, each.batch_size) for each in (loaded, local))
        torch.testing.assert_close(output, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_preprocessing_equals_that_of_the_library(name: str, saved: SaveModel) -> None:
    model = saved(name)
    preprocess = load(model).preprocess
    assert (preprocess is None) == (model.transform is None)
    if preprocess is None or model.transform is None:
        return
    image = Image.fromarray(np.random.default_rng(5).integers(0, 256, (75, 101, 3), np.uint8))
    encoded = io.BytesIO()
    image.save(encoded, "png")
    merged = merge_preprocess(None, preprocess)
    prepare = ImageTransform(
        DecodeSettings(), ResizeCrop(merged, model.folder), gray=merged.channels == "gray", apply_exif=False
    )
    pixels = Normalizer(merged)(prepare(encoded.getvalue()).pixels[None], torch.float32)[0]
    torch.testing.assert_close(pixels, model.transform(image), rtol=0, atol=model.transform_tolerance)


@pytest.mark.parametrize("name", FILE_FORMATS)
def test_check_finds_a_missing_file(name: str, saved: SaveModel, tmp_path: Path) -> None:
    model = saved(name)
    absent = make_settings(model, weights=str(tmp_path / "absent.pth"))
    for call in (absent.check, absent.load):
        with pytest.raises(InvalidJob, match=r"model\.weights: there is no file .*absent\.pth; correct the path"):
            call(READER, model.folder)


@pytest.mark.parametrize("name", FILE_FORMATS)
def test_file_with_another_digest_is_refused(name: str, saved: SaveModel) -> None:
    with pytest.raises(InvalidJob) as caught:
        load(saved(name), sha256="0" * 64)
    assert "has the sha256" in caught.value.message
    assert f"but model.sha256 is {'0' * 64}" in caught.value.message


@pytest.mark.parametrize("name", FORMATS)
def test_absent_device_is_refused(name: str, saved: SaveModel) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InvalidJob, match=r"runtime\.device: cuda is not there"):
        pick_device("cuda", load(saved(name)).devices)


@pytest.mark.parametrize("name", FORMATS)
def test_settings_survive_pickling(name: str, saved: SaveModel) -> None:
    model = make_settings(saved(name))
    unpickled = pickle.loads(pickle.dumps(model))
    assert unpickled == model
    assert unpickled.load(READER, saved(name).folder).digest == model.load(READER, saved(name).folder).digest


# ------------------------------------------------------------------------------------------------ files that are code


@pytest.mark.parametrize("missing_key", ["trust", "sha256"])
@pytest.mark.parametrize("name", CODE_FORMATS)
def test_code_without_trust_is_refused(name: str, missing_key: str, saved: SaveModel) -> None:
    model = saved(name)
    untrusted = MODEL.validate_python({key: value for key, value in model.settings.items() if key != missing_key})
    for call in (untrusted.check, untrusted.load):
        with pytest.raises(InvalidJob) as caught:
            call(READER, model.folder)
        for words in ("is code that runs when it is loaded", "model.trust: true", model.settings["sha256"]):
            assert words in caught.value.message


@dataclass(frozen=True)
class MaliciousObject:
    """Object that creates a marker file when it is unpickled."""

    marker: str
    shell: bool

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch '{self.marker}'",)) if self.shell else (open, (self.marker, "w"))


def save_with_torch(content: Any, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def save_as_tar(content: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(content, protocol=2)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


MALICIOUS_FILES: dict[str, Callable[[Any], bytes]] = {
    "malicious.pt": save_with_torch,
    "malicious.pth": lambda content: save_with_torch({"state_dict": content}, legacy=True),
    "malicious.pkl": pickle.dumps,
    "malicious.tar": save_as_tar,
    "malicious-old.pkl": lambda content: pickle.dumps(content, protocol=0),
}
MODEL_SETTINGS: list[dict[str, Any]] = [
    {"type": "checkpoint", "architecture": "resnet18"},
    {"type": "torchvision", "name": "resnet18"},
    {"type": "pickle"},
    {"type": "pickle", "trust": True},
    {"type": "pickle", "trust": True, "sha256": "0" * 64},
    {"type": "torchscript"},
    {"type": "exported"},
]


@pytest.mark.parametrize("shell", [True, False], ids=["system", "open"])
@pytest.mark.parametrize("file", MALICIOUS_FILES)
def test_malicious_pickle_never_runs(file: str, shell: bool, tmp_path: Path) -> None:
    marker = tmp_path / "code-ran"
    (tmp_path / file).write_bytes(MALICIOUS_FILES[file](MaliciousObject(str(marker), shell)))
    for settings in MODEL_SETTINGS:
        model = MODEL.validate_python({**settings, "weights": str(tmp_path / file)})
        with suppress(InvalidJob):
            model.check(READER, tmp_path)
        with pytest.raises(InvalidJob) as caught:
            model.load(READER, tmp_path)
        assert str(tmp_path / file) in caught.value.message
        assert not marker.exists()
    for settings in ({"type": "torchscript"}, {"type": "exported"}):
        model = MODEL.validate_python(with_trust({**settings, "weights": str(tmp_path / file)}, tmp_path / file))
        with pytest.raises(InvalidJob):
            model.load(READER, tmp_path)
        assert not marker.exists()


def test_malicious_object_is_malicious(tmp_path: Path) -> None:
    marker = tmp_path / "code-ran"
    pickle.loads(pickle.dumps(MaliciousObject(str(marker), shell=True)))
    assert marker.exists()


@pytest.mark.parametrize(
    ("saved_format", "model_type", "message"),
    [
        ("torchscript-traced", "pickle", "is a TorchScript archive and not a pickled module; write model.type: torchs"),
        ("torchscript-traced", "checkpoint", "is a TorchScript archive and not a state dict; write model.type: torchs"),
        ("torchscript-traced", "exported", "is a TorchScript archive and not a program of torch.export"),
        (
            "exported",
            "torchscript",
            "is a program of torch.export and not a TorchScript archive; write model.type: exp",
        ),
        ("exported", "checkpoint", "is a program of torch.export and not a state dict; write model.type: exported"),
        ("exported-aoti", "torchscript", "is an AOTInductor package and not a TorchScript archive; write model.type"),
        ("checkpoint-pth", "pickle", "is a file of tensors and not a pickled module; write model.type: checkpoint"),
        ("checkpoint-safetensors", "exported", "is a safetensors file and not a program of torch.export or a package"),
        ("pickle", "torchscript", "is a pickle of Python objects and not a TorchScript archive; write model.type: pic"),
        ("pickle", "checkpoint", "holds a whole module (net.Net, "),
    ],
)
def test_file_of_another_format_names_its_type(
    saved_format: str, model_type: str, message: str, saved: SaveModel, tmp_path: Path
) -> None:
    file = saved(saved_format).file
    assert file is not None
    shutil.copy(file, tmp_path / "net")
    document: dict[str, Any] = {"type": model_type, "weights": str(tmp_path / "net")}
    if model_type == "checkpoint":
        document["architecture"] = "resnet18"
    for settings in (document, with_trust(document, file)) if model_type != "checkpoint" else (document,):
        with pytest.raises(InvalidJob) as caught:
            MODEL.validate_python(settings).load(READER, tmp_path)
        assert f"{tmp_path / 'net'} {message}" in caught.value.message


@pytest.mark.parametrize("model_type", ["pickle", "torchscript", "exported"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "is a web page and not .*; download the file itself"),
        (b"PK\x03\x04 and nothing more", "is a zip archive that is not whole"),
        (b"\x00\x01 and nothing more", "or not a whole one"),
    ],
)
def test_file_without_a_model_is_refused(model_type: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(data)
    document = with_trust({"type": model_type, "weights": str(tmp_path / "net.pt")}, tmp_path / "net.pt")
    with pytest.raises(InvalidJob, match=rf"net\.pt .*{message}"):
        MODEL.validate_python(document).load(READER, tmp_path)
