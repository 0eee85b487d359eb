"""Detection of the format of a model file."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from typing import Any

import pytest
import torch
from torch import nn

from batchjob.errors import InvalidJob
from batchjob.models.file_format import FileFormat, detect_format, require_format


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("content", "file_format"), [(nn.Linear(2, 2).state_dict(), "state_dict"), (nn.Linear(2, 2), "pickled_module")]
)
def test_state_dicts_are_distinguished_from_modules(content: Any, file_format: FileFormat, legacy: bool) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    assert detect_format(buffer.getvalue()) == file_format


def make_zip(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return buffer.getvalue()


def make_tar(mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        archive.addfile(tarfile.TarInfo("net/weights.pth"), io.BytesIO())
    return buffer.getvalue()


FOREIGN_FILES = {
    "empty": (b"", "is empty"),
    "zeros": (bytes(5000), "is nothing but zeros"),
    "page": (b"\n<!doctype html>\n<html><title>\n Sign in </title></html>", "is a web page (Sign in)"),
    "XML page": (b'<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"></html>', "is a web page"),
    "error of a store": (b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "of a store (NoSuchKey)"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a Git LFS pointer"),
    "gzip": (gzip.compress(b"weights"), "is a gzip archive and not a state dict; unpack it"),
    "tar.gz": (make_tar("w:gz"), "is a tar archive (gzip) of net/weights.pth"),
    "tar": (make_tar("w"), "is a tar archive of net/weights.pth"),
    "zip": (make_zip("a/b.pth", "c.txt"), "is a zip archive of a/b.pth, c.txt"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(90), "is an HDF5 file, as Keras writes its models"),
    "Keras": (make_zip("metadata.json", "config.json", "model.weights.h5"), "is a Keras model (.keras)"),
    "npz": (make_zip("a.npy", "b.npy"), "is an archive of NumPy arrays"),
    "npy": (b"\x93NUMPY\x01\x00", "is a NumPy array"),
    "SavedModel": (b"\x08\x01\x12\x04\x0a\x02\x12\x00", "is a TensorFlow SavedModel (.pb)"),
    "frozen graph": (b"\x0a\x06\x0a\x01x\x12\x01C" + b"\x22\x02\x08\x01", "is a frozen graph of TensorFlow"),
    "TFLite": (b"\x1c\x00\x00\x00TFL3" + bytes(90), "is a TensorFlow Lite model"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(90), "is a GGUF file"),
    "Core ML": (b"\x08\x04\x12\x02\x0a\x00\xa2\x1f\x01x", "is a Core ML model"),
    "JSON": (b'{"lr": 0.1}', "is a JSON document"),
    "index": (b'{"metadata": {}, "weight_map": {"a": "b.safetensors"}}', "is the index of a model in several files"),
    "text": (b"lr: 0.1\nepochs: 3\n", "is a text file (lr: 0.1)"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(20), "is a PNG image"),
}


@pytest.mark.parametrize("accepted", ["unknown", "torchscript"])
@pytest.mark.parametrize("name", FOREIGN_FILES)
def test_file_that_is_no_model_is_named(name: str, accepted: FileFormat) -> None:
    data, words = FOREIGN_FILES[name]
    with pytest.raises(InvalidJob) as caught:
        require_format(data, "model.weights: w.pth", accepted, expected="a state dict")
    assert caught.value.message.startswith("model.weights: w.pth is ")
    assert words in caught.value.message
    assert " and not a state dict; " in caught.value.message


def test_onnx_is_told_from_other_protobuf_files() -> None:
    assert detect_format(b"\x08\x08\x12\x07pytorch\x1a\x032.0\x3a\x02\x12\x00") == "onnx"
    assert detect_format(b"\x08\x01\x12\x04\x0a\x02\x12\x00") == "unknown"
