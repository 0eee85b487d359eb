"""Text of a table file as UTF-8 bytes: decompressed by its content, not its name, and transcoded from UTF-16."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
from typing import Any, BinaryIO

import pyarrow as pa

from batchjob.errors import InvalidJob

__all__ = ["open_text"]

_BEGINNING_BYTES = 64  # read to recognise a file
_COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
# The mark of UTF-32 begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_OTHER_FILES = {
    b"pk\x03\x04": "a zip archive or an Excel sheet; save it as CSV",
    b"\xd0\xcf\x11\xe0": "an Excel sheet; save it as CSV",
    b"par1": "Parquet; give input.format: parquet",
    b"arrow1": "an Arrow file; write it as Parquet",
    b"obj\x01": "Avro; write it as Parquet",
    b"orc": "ORC; write it as Parquet",
    b"sqlite format 3\0": "a SQLite database; export the table as CSV",
    b"<!doctype html": "a web page; download the file itself",
    b"<html": "a web page; download the file itself",
    b"version https://git-lfs": "a Git LFS pointer; run `git lfs pull` for the file itself",
}


def open_text(stream: BinaryIO, uri: str) -> Any:
    """Return a file's text from its beginning, as a stream of UTF-8 bytes without a byte order mark.

    Args:
        stream: The file, seekable; it stays open.
        uri: URI of the file, for messages.

    Raises:
        InvalidJob: The file is no text, but of a kind that is known.
    """
    stream.seek(0)
    compression = _find_prefix(_COMPRESSIONS, stream.read(_BEGINNING_BYTES))
    beginning = _decompress(stream, compression).read(_BEGINNING_BYTES)
    if (kind := _find_prefix(_OTHER_FILES, beginning.lower())) is not None:
        raise InvalidJob(f"input.uri: {uri} is {kind}")
    text = _decompress(stream, compression)
    if beginning.startswith(codecs.BOM_UTF8):
        text.read(len(codecs.BOM_UTF8))
    encoding = _find_prefix(_MARKS, beginning) or _guess_encoding(beginning)
    if encoding is None:
        return text
    return pa.transcoding_input_stream(pa.PythonFile(_KeptOpen(text), mode="r"), encoding, "utf-8")


def _find_prefix(known: dict[bytes, str], beginning: bytes) -> str | None:
    return next((found for prefix, found in known.items() if beginning.startswith(prefix)), None)


def _guess_encoding(beginning: bytes) -> str | None:
    """Recognise UTF-16 without a mark by the zero bytes of a header in ASCII."""
    even, odd = beginning[::2], beginning[1::2]
    if not odd or any(odd) is any(even):
        return None
    return "utf-16-be" if any(odd) else "utf-16-le"


def _decompress(stream: BinaryIO, compression: str | None) -> Any:
    stream.seek(0)
    if compression == "gzip":
        return gzip.GzipFile(fileobj=stream)
    if compression == "bz2":
        return bz2.BZ2File(stream)
    if compression == "xz":
        return lzma.LZMAFile(stream)
    if compression is None:
        return stream
    return pa.CompressedInputStream(pa.PythonFile(_KeptOpen(stream), mode="r"), compression)


class _KeptOpen:
    """A stream that its reader cannot close."""

    closed = False

    def __init__(self, stream: Any) -> None:
        self.read = stream.read

    def close(self) -> None:
        """Do nothing: Arrow closes what it has read from, and the file is read again."""
