"""What holds for every model format alike: one suite over `FORMATS`; then what only some of them can get wrong."""

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
from formats import FORMATS, Built, example, outputs, trusted
from PIL import Image
from pydantic import TypeAdapter
from seaweed import Seaweed

from batchjob.errors import InvalidJob
from batchjob.inference.devices import pick_device
from batchjob.job.job import AnyModel
from batchjob.models.loaded_model import LoadedModel
from batchjob.preprocessing.normalize import Normalizer
from batchjob.preprocessing.settings import DecodeSettings, merge_preprocess
from batchjob.preprocessing.transforms import ImageTransform, ResizeCrop
from batchjob.storage.reader import Reader

READER = Reader()
MODEL: TypeAdapter[Any] = TypeAdapter(AnyModel)
CODE = [name for name in FORMATS if FORMATS[name].code]
FILES = [name for name in FORMATS if name not in {"python", "huggingface"}]  # a folder has tests of its own

Builder = Callable[..., Built]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    """`built(name, seed=1)`: a format's model, saved once for all tests, which leave it as it is."""
    made: dict[tuple[str, int], Built] = {}

    def build(name: str, seed: int = 1) -> Built:
        if FORMATS[name].missing():
            pytest.skip(FORMATS[name].missing())
        if (name, seed) not in made:
            made[name, seed] = FORMATS[name].build(tmp_path_factory.mktemp(name), seed)
        return made[name, seed]

    return build


def settings(model: Built, **other: Any) -> Any:
    return MODEL.validate_python({**model.settings, **other})


def load(model: Built, **other: Any) -> LoadedModel:
    loaded: LoadedModel = settings(model, **other).load(READER, model.base)
    return loaded


def refusal(model: Built, **other: Any) -> str:
    with pytest.raises(InvalidJob) as caught:
        load(model, **other)
    return caught.value.message


# ------------------------------------------------------------------------------------------------------ every format


@pytest.mark.parametrize("name", FORMATS)
def test_it_gives_what_a_plain_loop_gives_whatever_the_batch(name: str, built: Builder) -> None:
    model = built(name)
    loaded = load(model)
    pixels = example(17, model.side)
    with torch.inference_mode():
        wanted = model.loop(pixels)
    found = outputs(loaded.module, pixels, loaded.batch_size)
    torch.testing.assert_close(found, wanted, rtol=0, atol=model.tolerance)
    for count in (1, 8):
        parts = torch.cat([outputs(loaded.module, part, loaded.batch_size) for part in pixels.split(count)])
        torch.testing.assert_close(parts, found, rtol=0, atol=model.tolerance)


@pytest.mark.parametrize("name", FORMATS)
def test_it_is_in_eval_mode_on_the_cpu_and_wants_no_gradients(name: str, built: Builder) -> None:
    loaded = load(built(name))
    assert not any(module.training for module in loaded.module.modules())
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())
    tensors = [*loaded.module.parameters(), *loaded.module.buffers()]
    assert {tensor.device.type for tensor in tensors} <= {"cpu"}


@pytest.mark.parametrize("name", FORMATS)
def test_its_digest_follows_the_weights(name: str, built: Builder) -> None:
    digest = load(built(name)).digest
    assert digest == load(built(name)).digest
    assert len(bytes.fromhex(digest)) == 32
    if FORMATS[name].seeds > 1:
        assert digest != load(built(name, 2)).digest


@pytest.mark.parametrize("name", FILES)
def test_it_loads_from_any_storage(name: str, built: Builder, s3: Seaweed) -> None:
    model = built(name)
    assert model.file is not None
    bucket, memory = s3.bucket(), f"memory://contract/{name}/{model.file.name}"
    s3.put(bucket + model.file.name, model.file)
    with fsspec.open(memory, "wb") as there:
        there.write(model.file.read_bytes())
    at_home = load(model)
    for weights in (f"file://{model.file}", memory, bucket + model.file.name):
        settings(model, weights=weights).check(READER, model.base)
        loaded = load(model, weights=weights)
        assert loaded.digest == at_home.digest
        pixels = example(4, model.side)
        found, wanted = (outputs(one.module, pixels, one.batch_size) for one in (loaded, at_home))
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_the_preprocessing_it_brings_is_that_of_its_own_library(name: str, built: Builder) -> None:
    model = built(name)
    preprocess = load(model).preprocess
    assert (preprocess is None) == (model.transform is None)
    if preprocess is None or model.transform is None:
        return
    image = Image.fromarray(np.random.default_rng(5).integers(0, 256, (75, 101, 3), np.uint8))
    encoded = io.BytesIO()
    image.save(encoded, "png")
    merged = merge_preprocess(None, preprocess)
    prepare = ImageTransform(
        DecodeSettings(), ResizeCrop(merged, model.base), gray=merged.channels == "gray", apply_exif=False
    )
    pixels = Normalizer(merged)(prepare(encoded.getvalue()).pixels[None], torch.float32)[0]
    torch.testing.assert_close(pixels, model.transform(image), rtol=0, atol=model.transform_tolerance)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found_by_the_cheap_check(name: str, built: Builder, tmp_path: Path) -> None:
    model = built(name)
    absent = settings(model, weights=str(tmp_path / "absent.pth"))
    for find in (absent.check, absent.load):
        with pytest.raises(InvalidJob, match=r"model\.weights: there is no file .*absent\.pth; correct the path"):
            find(READER, model.base)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_digest_is_refused(name: str, built: Builder) -> None:
    said = refusal(built(name), sha256="0" * 64)
    assert "has the sha256" in said
    assert f"but model.sha256 is {'0' * 64}" in said


@pytest.mark.parametrize("name", FORMATS)
def test_a_device_that_is_not_there_is_refused(name: str, built: Builder) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InvalidJob, match=r"runtime\.device: cuda is not there"):
        pick_device("cuda", load(built(name)).devices)


@pytest.mark.parametrize("name", FORMATS)
def test_its_settings_reach_another_process(name: str, built: Builder) -> None:
    model = settings(built(name))
    again = pickle.loads(pickle.dumps(model))
    assert again == model
    assert again.load(READER, built(name).base).digest == model.load(READER, built(name).base).digest


# ------------------------------------------------------------------------------------------------ files that are code


@pytest.mark.parametrize("without", ["trust", "sha256"])
@pytest.mark.parametrize("name", CODE)
def test_code_is_not_loaded_without_trust(name: str, without: str, built: Builder) -> None:
    model = built(name)
    asked = MODEL.validate_python({key: value for key, value in model.settings.items() if key != without})
    for find in (asked.check, asked.load):
        with pytest.raises(InvalidJob) as caught:
            find(READER, model.base)
        for words in ("is code that runs when it is loaded", "model.trust: true", model.settings["sha256"]):
            assert words in caught.value.message


@dataclass(frozen=True)
class Evil:
    """Leaves a marker when it is unpickled."""

    marker: str
    shell: bool

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch '{self.marker}'",)) if self.shell else (open, (self.marker, "w"))


def torch_file(content: Any, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def tar_file(content: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(content, protocol=2)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


PLANTED: dict[str, Callable[[Any], bytes]] = {
    "evil.pt": torch_file,
    "evil.pth": lambda content: torch_file({"state_dict": content}, legacy=True),
    "evil.pkl": pickle.dumps,
    "evil.tar": tar_file,
    "evil-old.pkl": lambda content: pickle.dumps(content, protocol=0),
}
ASKED: list[dict[str, Any]] = [
    {"type": "checkpoint", "architecture": "resnet18"},
    {"type": "torchvision", "name": "resnet18"},
    {"type": "pickle"},
    {"type": "pickle", "trust": True},
    {"type": "pickle", "trust": True, "sha256": "0" * 64},
    {"type": "torchscript"},
    {"type": "exported"},
]


@pytest.mark.parametrize("shell", [True, False], ids=["system", "open"])
@pytest.mark.parametrize("file", PLANTED)
def test_an_evil_pickle_never_runs(file: str, shell: bool, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    (tmp_path / file).write_bytes(PLANTED[file](Evil(str(marker), shell)))
    for asked in ASKED:
        model = MODEL.validate_python({**asked, "weights": str(tmp_path / file)})
        with suppress(InvalidJob):
            model.check(READER, tmp_path)
        with pytest.raises(InvalidJob) as caught:
            model.load(READER, tmp_path)
        assert str(tmp_path / file) in caught.value.message
        assert not marker.exists()
    for asked in ({"type": "torchscript"}, {"type": "exported"}):
        model = MODEL.validate_python(trusted({**asked, "weights": str(tmp_path / file)}, tmp_path / file))
        with pytest.raises(InvalidJob):
            model.load(READER, tmp_path)
        assert not marker.exists()


def test_the_evil_pickle_is_evil(tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    pickle.loads(pickle.dumps(Evil(str(marker), shell=True)))
    assert marker.exists()


@pytest.mark.parametrize(
    ("given", "asked", "said"),
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
        ("pickle", "checkpoint", "holds code (net.Net) beside tensors: no code is loaded; save its state_dict, or a "),
    ],
)
def test_a_file_of_another_kind_is_told_its_type(
    given: str, asked: str, said: str, built: Builder, tmp_path: Path
) -> None:
    file = built(given).file
    assert file is not None
    shutil.copy(file, tmp_path / "net")
    document: dict[str, Any] = {"type": asked, "weights": str(tmp_path / "net")}
    if asked == "checkpoint":
        document["architecture"] = "resnet18"
    for one in (document, trusted(document, file)) if asked != "checkpoint" else (document,):
        with pytest.raises(InvalidJob) as caught:
            MODEL.validate_python(one).load(READER, tmp_path)
        assert f"{tmp_path / 'net'} {said}" in caught.value.message


@pytest.mark.parametrize("kind", ["pickle", "torchscript", "exported"])
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "or not a whole one"),
        (b"PK\x03\x04 and nothing more", "or not a whole one"),
    ],
)
def test_what_is_no_model_at_all(kind: str, data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(data)
    document = trusted({"type": kind, "weights": str(tmp_path / "net.pt")}, tmp_path / "net.pt")
    with pytest.raises(InvalidJob, match=rf"net\.pt .*{said}"):
        MODEL.validate_python(document).load(READER, tmp_path)
