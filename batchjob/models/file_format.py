"""What a model's file is, told by its content and without torch: nothing in it is run or unpickled."""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Iterator
from io import BytesIO
from typing import Literal

from batchjob.errors import InvalidJob

__all__ = ["FileFormat", "detect_format", "require_format"]

FileFormat = Literal["state", "safetensors", "module", "torchscript", "exported", "aoti", "onnx", "unknown"]
_IS = {
    "state": "a file of tensors",
    "safetensors": "a safetensors file",
    "module": "a pickle of Python objects",
    "torchscript": "a TorchScript archive",
    "exported": "a program of torch.export",
    "aoti": "an AOTInductor package",
    "onnx": "an ONNX model",
}
_TYPE = {
    "state": "checkpoint",
    "safetensors": "checkpoint",
    "module": "pickle",
    "torchscript": "torchscript",
    "exported": "exported",
    "aoti": "exported",
    "onnx": "onnx",
}
# What the pickle of a state dict names; a module's names its class too, which lies elsewhere.
_TENSORS = {"collections", "torch", "torch._utils", "torch._tensor", "torch.storage", "torch.nn.parameter"}
_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # how torch.save began before it wrote zip archives


def require_format(data: bytes, where: str, *wanted: FileFormat, expected: str) -> FileFormat:
    """The kind of a file that must be one of those wanted.

    Args:
        data: the file.
        where: key and file, for the sentence: "model.weights: net.pt".
        wanted: what it may be.
        wish: what it should be, for the sentence: "a TorchScript archive".

    Raises:
        InvalidJob: it is something else; where that is known, the sentence names the `type` it needs.
    """
    _arrived(data, where)
    kind = detect_format(data)
    if kind in wanted:
        return kind
    if kind == "unknown":
        raise InvalidJob(f"{where} is not {expected}, or not a whole one; correct the path, or copy it there again")
    raise InvalidJob(f"{where} is {_IS[kind]} and not {expected}; write model.type: {_TYPE[kind]}")


def detect_format(data: bytes) -> FileFormat:
    """What the content looks like; no promise that it is whole, or harmless."""
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") < len(data):
        return "safetensors"
    if data.startswith(b"PK\x03\x04"):
        return _kind_of_zip(data)
    if data.startswith((b"\x80", b"ccopy_reg")) or data[257:262] == b"ustar":
        return "state" if _is_plain(data) else "module"
    return "onnx" if data[:1] == b"\x08" and data[2:3] in {b"\x12", b"\x1a", b"\x3a", b"\x42"} else "unknown"


def _arrived(data: bytes, where: str) -> None:
    """Some files are not what they stand for."""
    if not data:
        raise InvalidJob(f"{where} is empty; copy the weights there again")
    if data.startswith(b"version https://git-lfs"):
        raise InvalidJob(f"{where} is a Git LFS pointer and not the weights; run 'git lfs pull' where it came from")


def _kind_of_zip(data: bytes) -> FileFormat:
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            # Everything lies below one folder, named like the file once was; torch 2.7 wrote programs without it.
            names = {name.partition("/")[2] or name: name for name in archive.namelist()}
            if "archive_format" in names or "serialized_exported_program.json" in names:
                return "aoti" if any("data/aotinductor/" in name for name in names) else "exported"
            if "constants.pkl" in names:
                return "torchscript"
            if "data.pkl" in names and archive.getinfo(names["data.pkl"]).compress_type == zipfile.ZIP_STORED:
                return "state" if _is_plain(archive.read(names["data.pkl"])) else "module"
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, NotImplementedError):
        pass
    return "unknown"


def _is_plain(data: bytes) -> bool:
    """Whether pickles name nothing but what tensors need."""
    try:
        return all(module in _TENSORS for module in _named(data))
    except (ValueError, IndexError, UnicodeDecodeError):  # not a pickle after all
        return False


def _named(data: bytes) -> Iterator[str]:
    """Modules that a pickle names; the fourth of the pickles that old files begin with is the content."""
    stream = BytesIO(data)
    for _ in range(4 if _MAGIC in data[:16] else 1):
        for code, argument, _place in pickletools.genops(stream):
            if code.name == "GLOBAL":
                yield str(argument).partition(" ")[0]
            elif code.name in {"STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}:
                yield "?"
