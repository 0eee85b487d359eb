"""Detect the format of a model file from its content, without torch; nothing in the file is run or unpickled."""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Iterator
from io import BytesIO
from typing import Literal

from batchjob.errors import InvalidJob

__all__ = ["FileFormat", "detect_format", "require_format"]

FileFormat = Literal[
    "state_dict", "safetensors", "pickled_module", "torchscript", "exported", "aot_inductor", "onnx", "unknown"
]

_DESCRIPTIONS = {
    "state_dict": "a file of tensors",
    "safetensors": "a safetensors file",
    "pickled_module": "a pickle of Python objects",
    "torchscript": "a TorchScript archive",
    "exported": "a program of torch.export",
    "aot_inductor": "an AOTInductor package",
    "onnx": "an ONNX model",
}
# The `model.type` that loads each format.
_MODEL_TYPES = {
    "state_dict": "checkpoint",
    "safetensors": "checkpoint",
    "pickled_module": "pickle",
    "torchscript": "torchscript",
    "exported": "exported",
    "aot_inductor": "exported",
    "onnx": "onnx",
}
# Modules named in the pickle of a state dict. The pickle of a whole module also names its class, which is elsewhere.
_STATE_DICT_MODULES = {
    "collections",
    "torch",
    "torch._utils",
    "torch._tensor",
    "torch.storage",
    "torch.nn.parameter",
}
# First bytes of a file by torch.save before torch 1.6, which introduced the zip archive.
_LEGACY_TORCH_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"


def require_format(data: bytes, where: str, *accepted: FileFormat, expected: str) -> FileFormat:
    """Check that a file has one of the accepted formats.

    Args:
        data: Content of the file.
        where: Job key and file, the start of the error message: "model.weights: net.pt".
        accepted: Formats that the caller can load.
        expected: Description of the accepted formats for the error message: "a TorchScript archive".

    Returns:
        The detected format.

    Raises:
        InvalidJob: The file has another format. If that format is known, the message names the `type` to write.
    """
    _check_not_placeholder(data, where)
    detected = detect_format(data)
    if detected in accepted:
        return detected
    if detected == "unknown":
        raise InvalidJob(f"{where} is not {expected}, or not a whole one; correct the path, or copy it there again")
    raise InvalidJob(
        f"{where} is {_DESCRIPTIONS[detected]} and not {expected}; write model.type: {_MODEL_TYPES[detected]}"
    )


def detect_format(data: bytes) -> FileFormat:
    """Detect a format from magic bytes and archive members. The file may still be incomplete or harmful."""
    # safetensors: 8 bytes with the length of the header, then the header, which is JSON.
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") < len(data):
        return "safetensors"
    if data.startswith(b"PK\x03\x04"):
        return _detect_zip_format(data)
    # Pickle protocol 2 and later, pickle protocol 0, and the tar archives of torch 0.1.
    if data.startswith((b"\x80", b"ccopy_reg")) or data[257:262] == b"ustar":
        return "state_dict" if _names_only_tensors(data) else "pickled_module"
    # ONNX: protobuf field 1 (ir_version, one byte), then field 2, 3, 7 or 8 of ModelProto.
    return "onnx" if data[:1] == b"\x08" and data[2:3] in {b"\x12", b"\x1a", b"\x3a", b"\x42"} else "unknown"


def _check_not_placeholder(data: bytes, where: str) -> None:
    if not data:
        raise InvalidJob(f"{where} is empty; copy the weights there again")
    if data.startswith(b"version https://git-lfs"):
        raise InvalidJob(f"{where} is a Git LFS pointer and not the weights; run 'git lfs pull' where it came from")


def _detect_zip_format(data: bytes) -> FileFormat:
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            # All members are in one folder, named after the original file. torch 2.7 wrote programs without it.
            # Example: "net/data.pkl" → "data.pkl".
            members = {name.partition("/")[2] or name: name for name in archive.namelist()}
            if "archive_format" in members or "serialized_exported_program.json" in members:
                return "aot_inductor" if any("data/aotinductor/" in name for name in members) else "exported"
            if "constants.pkl" in members:
                return "torchscript"
            if "data.pkl" in members and archive.getinfo(members["data.pkl"]).compress_type == zipfile.ZIP_STORED:
                return "state_dict" if _names_only_tensors(archive.read(members["data.pkl"])) else "pickled_module"
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, NotImplementedError):
        pass
    return "unknown"


def _names_only_tensors(data: bytes) -> bool:
    """Check that pickles name no classes except those that tensors need."""
    try:
        return all(module in _STATE_DICT_MODULES for module in _list_pickled_modules(data))
    except (ValueError, IndexError, UnicodeDecodeError):  # not a pickle
        return False


def _list_pickled_modules(data: bytes) -> Iterator[str]:
    """Yield the modules named in pickles, "?" for a module that is known only when the pickle runs."""
    stream = BytesIO(data)
    # A legacy file by torch.save starts with four pickles: magic number, protocol version, system facts, content.
    for _ in range(4 if _LEGACY_TORCH_MAGIC in data[:16] else 1):
        for opcode, argument, _position in pickletools.genops(stream):
            if opcode.name == "GLOBAL":
                yield str(argument).partition(" ")[0]
            elif opcode.name in {"STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}:
                yield "?"
