"""Detect the format of a model file from its content, without torch; nothing in the file is run or unpickled."""

from __future__ import annotations

import _compat_pickle
import pickletools
import zipfile
from collections.abc import Iterator
from io import BytesIO
from typing import Literal

from batchjob.errors import InvalidJob
from batchjob.models.foreign_file import find_onnx_graph, identify_foreign_file

__all__ = ["FileFormat", "detect_format", "is_tensor_global", "list_pickled_globals", "require_format"]

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
# Members of the tar archives that torch 0.1 wrote.
_OLD_TORCH_MEMBERS = (b"pickle\0", b"sys_info\0", b"storages\0", b"tensors\0")


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
        InvalidJob: The file has another format. If that format is known, the message names the `type` to write, or
            what to do with a file that no type reads.
    """
    detected = detect_format(data)
    if detected == "unknown" and (foreign := identify_foreign_file(data)):
        raise InvalidJob(f"{where} is {foreign.description} and not {expected}; {foreign.advice}")
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
    is_old_torch = data[257:262] == b"ustar" and data.startswith(_OLD_TORCH_MEMBERS)
    if data.startswith((b"\x80", b"ccopy_reg")) or is_old_torch:
        return "state_dict" if _names_only_tensors(data) else "pickled_module"
    return "onnx" if find_onnx_graph(data) else "unknown"


def list_pickled_globals(data: bytes) -> set[str]:
    """List the classes and functions named in a file by torch.save, as `module.name`; nothing is unpickled.

    Names of Python 2 are those of Python 3: `__builtin__.list` is `builtins.list`.
    """
    try:
        if data.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(BytesIO(data)) as archive:
                pickles = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
        else:
            pickles = [data]
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, NotImplementedError):
        return set()
    names: set[str] = set()
    for content in pickles:
        try:
            for module, name in _iterate_pickled_globals(content):
                names.add(".".join(_rename_python2_global(module, name)))
        except (ValueError, IndexError, UnicodeDecodeError):  # not a pickle, or not a whole one
            continue
    return names


def is_tensor_global(name: str) -> bool:
    """Return True if a class or function, as `module.name`, is one that the pickle of a state dict names."""
    return name.rpartition(".")[0] in _STATE_DICT_MODULES


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
        return all(module in _STATE_DICT_MODULES for module, _ in _iterate_pickled_globals(data))
    except (ValueError, IndexError, UnicodeDecodeError):  # not a pickle
        return False


def _iterate_pickled_globals(data: bytes) -> Iterator[tuple[str, str]]:
    """Yield module and name of the globals in pickles, "?" for a module that is known only when the pickle runs."""
    stream = BytesIO(data)
    # A legacy file by torch.save starts with four pickles: magic number, protocol version, system facts, content.
    for _ in range(4 if _LEGACY_TORCH_MAGIC in data[:16] else 1):
        for opcode, argument, _position in pickletools.genops(stream):
            if opcode.name == "GLOBAL":
                module, _, name = str(argument).partition(" ")
                yield module, name
            elif opcode.name in {"STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}:
                yield "?", "?"


def _rename_python2_global(module: str, name: str) -> tuple[str, str]:
    if (module, name) in _compat_pickle.NAME_MAPPING:
        return _compat_pickle.NAME_MAPPING[module, name]
    return _compat_pickle.IMPORT_MAPPING.get(module, module), name
