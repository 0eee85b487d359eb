"""TIFF files of all kinds of samples: right, or refused with a message that names them."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest

from batchjob.errors import ImageError
from batchjob.preprocessing.decode import decode
from batchjob.preprocessing.settings import DecodeSettings
from batchjob.preprocessing.tiff_samples import read_tiff_samples

RAMP = np.linspace(0, 1, 16).reshape(4, 4, 1)
RGB = np.concatenate([RAMP, 1 - RAMP, np.full_like(RAMP, 0.4)], 2)
UNSIGNED, SIGNED, FLOAT, COMPLEX = 1, 2, 3, 6
WHITE_IS_ZERO, BLACK_IS_ZERO, COLOUR = 0, 1, 2


def write_tiff(
    samples: np.ndarray[Any, Any], photometric: int, kind: int = UNSIGNED, *, order: str = "<", **options: bool
) -> bytes:
    """Write samples `[h, w, c]` as a TIFF file of one strip, or of one for each plane.

    Args:
        samples: Samples in the dtype of the file.
        photometric: Meaning of the samples.
        kind: Sample format: 1 unsigned, 2 signed, 3 floating point, 6 complex.
        order: Order of bytes, `<` or `>`.
        options: `planar` for a plane for each sample, `deflated` for compressed ones.
    """
    height, width, count = samples.shape
    ordered = samples.astype(samples.dtype.newbyteorder(order))
    planes = [ordered[..., index] for index in range(count)] if options.get("planar") else [ordered]
    strips = [np.ascontiguousarray(plane).tobytes() for plane in planes]
    if options.get("deflated"):
        strips = [zlib.compress(strip) for strip in strips]
    body = io.BytesIO(bytes(8))
    body.seek(8)
    offsets = [body.tell() + sum(map(len, strips[:index])) for index in range(len(strips))]
    body.write(b"".join(strips))
    tags = {
        256: ("I", [width]), 257: ("I", [height]), 258: ("H", [samples.dtype.itemsize * 8] * count),
        259: ("H", [8 if options.get("deflated") else 1]), 262: ("H", [photometric]), 273: ("I", offsets),
        277: ("H", [count]), 278: ("I", [height]), 279: ("I", [len(strip) for strip in strips]),
        284: ("H", [2 if options.get("planar") else 1]), 339: ("H", [kind] * count),
    }  # fmt: skip
    entries = b""
    for tag, (code, values) in tags.items():
        raw = struct.pack(f"{order}{len(values)}{code}", *values)
        if len(raw) > 4:
            body.write(bytes(body.tell() % 2))
            raw, _ = struct.pack(f"{order}I", body.tell()), body.write(raw)
        entries += struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4}[code], len(values)) + raw.ljust(4, b"\0")
    body.write(bytes(body.tell() % 2))
    start = body.tell()
    body.write(struct.pack(f"{order}H", len(tags)) + entries + bytes(4))
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}I", start) + body.getvalue()[8:]


def decode_pixels(data: bytes) -> np.ndarray[Any, Any]:
    return decode(data, DecodeSettings(), "rgb", False).pixels


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("samples", "photometric", "kind", "options"),
    [
        ((RAMP * 255).astype("u1"), BLACK_IS_ZERO, UNSIGNED, {}),
        (255 - (RAMP * 255).astype("u1"), WHITE_IS_ZERO, UNSIGNED, {}),
        ((RAMP * 65535).astype("u2"), BLACK_IS_ZERO, UNSIGNED, {}),
        (RAMP.astype("f4"), BLACK_IS_ZERO, FLOAT, {}),
        ((RAMP * 255).astype("f4"), BLACK_IS_ZERO, FLOAT, {}),
        ((RAMP * 255).astype("i4"), BLACK_IS_ZERO, SIGNED, {}),
        ((RGB * 255).astype("u1"), COLOUR, UNSIGNED, {}),
        ((RGB * 255).astype("u1"), COLOUR, UNSIGNED, {"planar": True}),
        ((RGB * 65535).astype("u2"), COLOUR, UNSIGNED, {}),
        ((RGB * 65535).astype("u2"), COLOUR, UNSIGNED, {"planar": True, "deflated": True}),
    ],
)
def test_samples_that_are_read_are_right(
    samples: np.ndarray[Any, Any], photometric: int, kind: int, options: dict[str, bool], order: str
) -> None:
    pixels = decode_pixels(write_tiff(samples, photometric, kind, order=order, **options))
    expected = RGB if samples.shape[2] == 3 else np.repeat(RAMP, 3, 2)
    assert np.abs(pixels - expected * 255).max() <= 1


def test_sixteen_bits_of_which_zero_is_white_are_inverted() -> None:
    samples = 65535 - (RAMP * 65535).astype("u2")
    assert np.abs(decode_pixels(write_tiff(samples, WHITE_IS_ZERO)) - RAMP * 255).max() <= 1
    assert np.abs(decode_pixels(write_tiff(samples, WHITE_IS_ZERO, deflated=True)) - RAMP * 255).max() <= 1
    with pytest.raises(ImageError, match=r"grey of 1 unsigned sample of 16 bits, of which 0 is white, which is not"):
        decode_pixels(write_tiff(samples, WHITE_IS_ZERO, order=">"))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("samples", "photometric", "kind", "options", "named"),
    [
        (RAMP.astype("f8"), BLACK_IS_ZERO, FLOAT, {}, "grey of 1 floating point sample of 64 bits"),
        (RAMP.astype("f2"), BLACK_IS_ZERO, FLOAT, {}, "grey of 1 floating point sample of 16 bits"),
        (RAMP.astype("f4"), WHITE_IS_ZERO, FLOAT, {}, "floating point sample of 32 bits, of which 0 is white"),
        ((RAMP * 65535).astype("f4"), BLACK_IS_ZERO, FLOAT, {}, "floating point samples up to 65,535, of which none"),
        (RGB.astype("f4"), COLOUR, FLOAT, {}, "RGB of 3 floating point samples of 32 bits"),
        (RGB.astype("f8"), COLOUR, FLOAT, {}, "RGB of 3 floating point samples of 64 bits"),
        ((RGB * 65535).astype("u2"), COLOUR, UNSIGNED, {"planar": True}, "16 bits, each in a plane of its own"),
        ((RGB * 127).astype("i1"), COLOUR, SIGNED, {}, "RGB of 3 signed samples of 8 bits"),
        ((RAMP * 127).astype("i1"), BLACK_IS_ZERO, SIGNED, {}, "grey of 1 signed sample of 8 bits"),
        ((RAMP * (2**32 - 1)).astype("u4"), BLACK_IS_ZERO, UNSIGNED, {}, "unsigned sample"),
        (np.repeat(RAMP * 255, 5, 2).astype("u1"), BLACK_IS_ZERO, UNSIGNED, {}, "grey of 5 unsigned samples of 8 bits"),
        (RAMP.astype("c8"), BLACK_IS_ZERO, COMPLEX, {}, "complex"),
    ],
)
def test_samples_that_are_not_read_are_named(
    samples: np.ndarray[Any, Any], photometric: int, kind: int, options: dict[str, bool], named: str, order: str
) -> None:
    with pytest.raises(ImageError, match=named) as caught:
        decode_pixels(write_tiff(samples, photometric, kind, order=order, **options))
    assert caught.value.type == "unsupported"


def test_damaged_tags_say_nothing() -> None:
    whole = write_tiff((RGB * 255).astype("u1"), COLOUR)
    assert read_tiff_samples(whole) is not None
    assert read_tiff_samples(whole[:-100]) is None
    for position in range(4, len(whole)):
        read_tiff_samples(whole[:position] + b"\xff" * 8 + whole[position + 8 :])  # raises nothing
    assert read_tiff_samples(b"II+\0" + b"\xff" * 40) is None
