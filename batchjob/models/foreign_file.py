"""Files that no `model.type` reads, by their content: web pages, pointers, archives, and models of other frameworks."""

from __future__ import annotations

import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO

__all__ = ["ForeignFile", "find_onnx_graph", "identify_foreign_file"]

_TO_ONNX = "export it as ONNX where it was made ({tool}), and write model.type: onnx"
_KERAS_ADVICE = _TO_ONNX.format(tool="model.export(FILE, format='onnx') of Keras 3, or tf2onnx")
_TENSORFLOW_ADVICE = _TO_ONNX.format(tool="python -m tf2onnx.convert")
_UNPACK_ADVICE = "unpack it, and name the file in it"
_DOWNLOAD_ADVICE = "download the file itself (the address of a raw file, signed in where that is needed)"
_NO_TENSORS_ADVICE = "name the file that holds the tensors"
_MAX_NAMED_MEMBERS = 3
# ONNX's ModelProto: its graph is field 7. Core ML's Model: the fields of its kinds of models start at 200.
_ONNX_GRAPH = 7
_COREML_KINDS = 200
_LEADING_SPACE = re.compile(rb"\s*(\xef\xbb\xbf)?\s*")


@dataclass(frozen=True)
class ForeignFile:
    """A file that cannot be loaded as a model.

    Attributes:
        description: The file in words, with an article: "an HDF5 file".
        advice: Imperative sentence with what to do: "unpack it, and name the file in it".
    """

    description: str
    advice: str


# First bytes of a file -> what it is.
_MAGIC: tuple[tuple[bytes, ForeignFile], ...] = (
    (
        b"version https://git-lfs",
        ForeignFile("a Git LFS pointer", "run 'git lfs pull' where it came from, and copy the file there again"),
    ),
    (b"\x89HDF\r\n\x1a\n", ForeignFile("an HDF5 file, as Keras writes its models (.h5)", _KERAS_ADVICE)),
    (b"GGUF", ForeignFile("a GGUF file of llama.cpp", "name the weights for PyTorch that it was made from")),
    (b"ggml", ForeignFile("a GGML file of llama.cpp", "name the weights for PyTorch that it was made from")),
    (b"\x93NUMPY", ForeignFile("a NumPy array (.npy)", _NO_TENSORS_ADVICE)),
    (b"PAR1", ForeignFile("a Parquet file", _NO_TENSORS_ADVICE)),
    (b"%PDF", ForeignFile("a PDF document", _NO_TENSORS_ADVICE)),
    (b"\x89PNG\r\n", ForeignFile("a PNG image", _NO_TENSORS_ADVICE)),
    (b"\xff\xd8\xff", ForeignFile("a JPEG image", _NO_TENSORS_ADVICE)),
    (b"ftrt", ForeignFile("an engine of TensorRT", "compile the model with torch-tensorrt (batchjob convert)")),
    (b"ptrt", ForeignFile("an engine of TensorRT", "compile the model with torch-tensorrt (batchjob convert)")),
    (b"\x28\xb5\x2f\xfd", ForeignFile("a zstd archive", _UNPACK_ADVICE)),
    (b"\xfd7zXZ\x00", ForeignFile("an xz archive", _UNPACK_ADVICE)),
    (b"BZh", ForeignFile("a bzip2 archive", _UNPACK_ADVICE)),
    (b"7z\xbc\xaf\x27\x1c", ForeignFile("a 7z archive", _UNPACK_ADVICE)),
    (b"Rar!", ForeignFile("a RAR archive", _UNPACK_ADVICE)),
)


def identify_foreign_file(data: bytes) -> ForeignFile | None:
    """Identify a file in none of the formats that batchjob loads; None if it is not known either."""
    if not data:
        return ForeignFile("empty", "copy the weights there again")
    if data[:4096].strip(b"\0") == b"" and data.strip(b"\0") == b"":
        return ForeignFile("nothing but zeros", "copy the weights there again")
    for magic, known in _MAGIC:
        if data.startswith(magic):
            return known
    detectors: tuple[Callable[[bytes], ForeignFile | None], ...] = (
        _identify_archive,
        _identify_flatbuffer,
        _identify_text,
        _identify_protobuf,
    )
    return next((foreign for detect in detectors if (foreign := detect(data))), None)


def find_onnx_graph(data: bytes) -> bool:
    """Return True if a file is a protobuf message whose fields are those of an ONNX model."""
    # Field 1 is the IR version, one byte; field 2, 3, 7 or 8 follows.
    if data[:1] != b"\x08" or data[2:3] not in {b"\x12", b"\x1a", b"\x3a", b"\x42"}:
        return False
    fields = set(_iterate_protobuf_fields(data))
    # A file that was cut off may end before its graph; SavedModel and Core ML only have messages as their field 2.
    return _ONNX_GRAPH in fields or (not fields <= {1, 2} and max(fields) < _COREML_KINDS)


def _identify_archive(data: bytes) -> ForeignFile | None:
    if data.startswith(b"\x1f\x8b"):
        return _identify_tar(data, "gzip") or ForeignFile("a gzip archive", _UNPACK_ADVICE)
    if data[257:262] == b"ustar":
        return _identify_tar(data, "") or ForeignFile("a tar archive, and not a whole one", "copy it there again")
    if data.startswith(b"PK\x05\x06"):
        return ForeignFile("a zip archive without files", "copy the weights there again")
    return _identify_zip(data) if data.startswith(b"PK\x03\x04") else None


def _identify_tar(data: bytes, compression: str) -> ForeignFile | None:
    try:
        with tarfile.open(fileobj=BytesIO(data)) as archive:
            first = [member.name for member, _ in zip(archive, range(_MAX_NAMED_MEMBERS + 1), strict=False)]
    except (tarfile.TarError, EOFError, OSError):
        return None
    kind = f"a tar archive ({compression})" if compression else "a tar archive"
    return ForeignFile(f"{kind} of {_name_members(first)}", _UNPACK_ADVICE)


def _identify_zip(data: bytes) -> ForeignFile | None:
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return ForeignFile("a zip archive that is not whole (torch.save writes such)", "copy it there again")
    if {"config.json", "model.weights.h5"} <= set(names):
        return ForeignFile("a Keras model (.keras)", _KERAS_ADVICE)
    if names and all(name.endswith(".npy") for name in names):
        return ForeignFile("an archive of NumPy arrays (.npz)", "name weights for PyTorch, saved by torch.save")
    if any(name.endswith("data.pkl") for name in names):
        return ForeignFile("a file by torch.save that was packed again with compression", "copy the original there")
    return ForeignFile(f"a zip archive of {_name_members(names)}", _UNPACK_ADVICE)


def _name_members(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMED_MEMBERS]) or "nothing"
    return f"{shown}, …" if len(names) > _MAX_NAMED_MEMBERS else shown


def _identify_flatbuffer(data: bytes) -> ForeignFile | None:
    if data[4:8] == b"TFL3":
        advice = _TO_ONNX.format(tool="python -m tf2onnx.convert --tflite FILE")
        return ForeignFile("a TensorFlow Lite model (.tflite)", advice)
    if data[4:8] in {b"ET12", b"ET11"}:
        return ForeignFile("an ExecuTorch program (.pte)", "export the model by torch.export, model.type: exported")
    return None


def _identify_text(data: bytes) -> ForeignFile | None:
    start = _LEADING_SPACE.sub(b"", data[:4096], count=1)
    lower = start[:512].lower()
    if lower.startswith((b"<!doctype html", b"<html")) or (lower.startswith(b"<") and b"<html" in lower):
        title = re.search(rb"<title[^>]*>\s*(.{1,80}?)\s*</title>", start, re.IGNORECASE | re.DOTALL)
        named = f" ({' '.join(title[1].decode(errors='replace').split())})" if title else ""
        return ForeignFile(f"a web page{named}", _DOWNLOAD_ADVICE)
    if lower.startswith((b"<?xml", b"<error")):
        code = re.search(rb"<Code>(\w{1,60})</Code>", start)
        if code:
            return ForeignFile(f"an error answer of a store ({code[1].decode()})", _DOWNLOAD_ADVICE)
        return ForeignFile("an XML document", _NO_TENSORS_ADVICE)
    if start[:1] in {b"{", b"["}:
        return _identify_json(data)
    try:
        text = data[:4096].decode()
    except UnicodeDecodeError:
        return None
    printable = text.isprintable() or all(char.isprintable() or char in "\r\n\t" for char in text)
    if not printable:
        return None
    first_line = (text.strip().splitlines() or [""])[0][:60]
    return ForeignFile(f"a text file ({first_line})", f"{_NO_TENSORS_ADVICE}, or copy it there again")


def _identify_json(data: bytes) -> ForeignFile:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return ForeignFile("a text file in braces, like JSON", _NO_TENSORS_ADVICE)
    if isinstance(content, dict) and "weight_map" in content:
        return ForeignFile(
            "the index of a model in several files",
            "name the folder of the model (model.type: huggingface), or join the files in one",
        )
    return ForeignFile("a JSON document", _NO_TENSORS_ADVICE)


def _identify_protobuf(data: bytes) -> ForeignFile | None:
    fields = list(_iterate_protobuf_fields(data))
    if not fields:
        return None
    # SavedModel: a version, then graphs. A frozen GraphDef: its nodes (1), its versions (4), its library (2).
    if data[:3] == b"\x08\x01\x12" and set(fields) <= {1, 2}:
        return ForeignFile("a TensorFlow SavedModel (.pb)", _TENSORFLOW_ADVICE)
    if data[:1] == b"\x08" and fields[:1] == [1] and max(fields) >= _COREML_KINDS:
        return ForeignFile("a Core ML model (.mlmodel)", "name the weights for PyTorch that it was made from")
    if data[:1] == b"\x0a" and set(fields) <= {1, 2, 3, 4, 5} and len(fields) > 1 and _is_graph_node(data):
        return ForeignFile("a frozen graph of TensorFlow (.pb)", _TENSORFLOW_ADVICE)
    return None


def _is_graph_node(data: bytes) -> bool:
    """Check that the first field is a NodeDef: the node's name (1), then its operator (2), both text."""
    _, start = _read_varint(data, 1)
    length, text = _read_varint(data, start + 1)
    return data[start : start + 1] == b"\x0a" and data[text + length : text + length + 1] == b"\x12"


def _iterate_protobuf_fields(data: bytes) -> Iterator[int]:
    """Yield the numbers of the top-level fields of a protobuf message, as far as it can be read.

    The lowest three bits of a field's tag say how long its value is. Example: the tag 0x12 is field 2 (0x12 >> 3), and
    its value has a length in front (0x12 & 7 = 2).
    """
    position = 0
    while position < len(data):
        tag, position = _read_varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        if number == 0 or wire_type not in {0, 1, 2, 5}:
            return
        yield number
        if wire_type == 0:
            _, position = _read_varint(data, position)
        elif wire_type == 2:
            length, position = _read_varint(data, position)
            position += length
        else:
            position += 8 if wire_type == 1 else 4


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """Read a number of 7 bits per byte, the lowest first; return it and the position behind it."""
    value = shift = 0
    while position < len(data):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80 or shift > 63:
            break
    return value, position
