"""PNG files whose text, colour profile or other chunks without pixels are damaged or too large."""

from __future__ import annotations

import io
import resource
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from batchjob.errors import ImageError
from batchjob.preprocessing.decode import DecodedImage, decode
from batchjob.preprocessing.png_chunks import keep_pixel_chunks
from batchjob.preprocessing.settings import DecodeSettings

AFTER_HEADER = 33
LARGE = 2_000_000


def chunk(kind: bytes, content: bytes, *, damaged: bool = False) -> bytes:
    checksum = zlib.crc32(kind + content) ^ damaged
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def write_png(*chunks: bytes, **options: Any) -> bytes:
    """Write a PNG file of 6x4 pixels with further chunks behind its header."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", **options)
    whole = out.getvalue()
    return whole[:AFTER_HEADER] + b"".join(chunks) + whole[AFTER_HEADER:]


def decode_png(data: bytes) -> DecodedImage:
    return decode(data, DecodeSettings(), "rgb", True)


@pytest.mark.parametrize(
    "bad",
    [
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * LARGE)),
        chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b"x" * LARGE)),
        chunk(b"iCCP", b"icc\0\0" + zlib.compress(np.random.default_rng(0).bytes(LARGE))),
        chunk(b"tEXt", b"a\0b", damaged=True),
        chunk(b"gAMA", b"\0\0\xb1\x8f", damaged=True),
        chunk(b"tIME", b"", damaged=True),
        chunk(b"pHYs", b"\0"),
        chunk(b"zTXt", b"Comment\0\7nothing"),
        b"".join(chunk(b"tEXt", b"key\0" + b"x" * LARGE) for _ in range(40)),
    ],
    ids=["ztxt", "itxt", "icc", "text-crc", "gamma-crc", "time-crc", "short", "compression", "much-text"],
)
def test_chunk_without_pixels_costs_nothing(bad: bytes) -> None:
    plain = decode_png(write_png())
    assert (decode_png(write_png(bad)).pixels == plain.pixels).all()


def test_orientation_is_kept_beside_a_bad_chunk() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    bad = chunk(b"tEXt", b"a\0b", damaged=True)
    turned = decode_png(write_png(bad, exif=exif))
    assert turned.axes_swapped
    assert (turned.pixels == decode_png(write_png(exif=exif)).pixels).all()


def test_bombs_are_not_expanded() -> None:
    """100 chunks of 1 MB would be 100 GB of text."""
    bomb = chunk(
        b"zTXt", b"Comment\0\0" + zlib.compress(zlib.compress(b"\0" * 500_000_000, 9)[:1] + b"\0" * 200_000_000, 9)
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert decode_png(write_png(*[bomb] * 20)).pixels.shape == (4, 6, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_damaged_pixels_stay_an_error() -> None:
    whole = write_png(chunk(b"tEXt", b"a\0b", damaged=True))
    start = whole.index(b"IDAT") + 8
    with pytest.raises(ImageError) as caught:
        decode_png(whole[:start] + bytes(8) + whole[start + 8 :])
    assert caught.value.type in {"corrupt", "truncated"}
    with pytest.raises(ImageError) as caught:
        decode_png(whole[: start + 20])
    assert caught.value.type == "truncated"


def test_only_chunks_without_pixels_are_removed() -> None:
    assert keep_pixel_chunks(write_png()) is None
    assert keep_pixel_chunks(b"\xff\xd8\xff") is None
    assert keep_pixel_chunks(write_png(chunk(b"gAMA", b"\0\0\xb1\x8f"))) == write_png()
    text = chunk(b"tEXt", b"Author\0me")
    assert keep_pixel_chunks(write_png(text, chunk(b"zTXt", b"a\0\0b"))) == write_png(text)
