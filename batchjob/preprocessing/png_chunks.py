"""PNG chunks: removes those that hold no pixels, where one of them keeps Pillow from a file whose pixels are whole."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

__all__ = ["keep_pixel_chunks"]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PIXEL_CHUNKS = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
_KEPT_CHUNKS = {b"eXIf", b"tRNS"}
# Text may hold the orientation, as XMP or raw EXIF, so it is kept up to this size in all. Compressed text is not: it
# would have to be expanded.
_MAX_TEXT_BYTES = 1 << 20


def keep_pixel_chunks(data: bytes) -> bytes | None:
    """Return a PNG file without the chunks that no pixel depends on; None if it is no PNG file or has no others.

    Orientation and transparency stay, if their checksum is right. Chunks of pixels stay as they are, damaged or not.
    """
    if not data.startswith(_SIGNATURE):
        return None
    kept, text_bytes = [_SIGNATURE], 0
    for kind, chunk in _iterate_chunks(data):
        if kind in _PIXEL_CHUNKS:
            kept.append(chunk)
        elif zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:]):
            is_text = _is_plain_text(kind, chunk[8:-4]) and text_bytes + len(chunk) <= _MAX_TEXT_BYTES
            text_bytes += len(chunk) if is_text else 0
            if is_text or kind in _KEPT_CHUNKS:
                kept.append(chunk)
    stripped = b"".join(kept)
    return stripped if len(stripped) < len(data) else None


def _iterate_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield type and whole chunk (length, type, content, checksum); the last one may be cut off."""
    start = len(_SIGNATURE)
    while start + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        yield kind, data[start:end]
        start = end


def _is_plain_text(kind: bytes, content: bytes) -> bool:
    # iTXt is a keyword, a zero byte, and a byte that is not zero where the text is compressed.
    return kind == b"tEXt" or (kind == b"iTXt" and content.partition(b"\0")[2][:1] == b"\0")
