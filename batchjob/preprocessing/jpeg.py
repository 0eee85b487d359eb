"""Ordinary JPEG files through libjpeg-turbo; odd ones, and all with any damage, are left to a more patient decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

__all__ = ["MinSize", "choose_scale_denominator", "decode_jpeg", "read_baseline_jpeg_size", "read_jpeg_size"]

MinSize = int | tuple[int, int]
"""Pixels that are needed: of the shorter side, or height and width."""
_COLOURS = {"Gray", "YCbCr"}  # of the others Pillow makes something else
_FRAMES = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}  # by cosines; a lossless one may have any number of bits
_BASELINE = 0xC0
_END = b"\xff\xd9"
_NO_FRAMES = {0xC4, 0xC8, 0xCC}  # between the markers of frames
_SHRUNK = (8, 4, 2)  # of what libjpeg can, that which it is fast at


def read_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a file that `jpeg_pixels` may decode; None where that is hopeless."""
    from simplejpeg import decode_jpeg_header

    if _frame(data) not in _FRAMES:
        return None
    try:
        height, width, colours, _ = decode_jpeg_header(data)
    except Exception:  # noqa: BLE001 - whatever ails the file, the other decoder finds it too, and names it
        return None
    return (int(height), int(width)) if colours in _COLOURS else None


def read_baseline_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a file that a GPU's decoder may be trusted with; None of all others.

    That is a baseline file in YCbCr that ends as it should: such a decoder may fill up a torn one without a word.
    """
    from simplejpeg import decode_jpeg_header

    if not data.endswith(_END) or _frame(data) != _BASELINE:
        return None
    try:
        height, width, colours, _ = decode_jpeg_header(data)
    except Exception:  # noqa: BLE001 - likewise
        return None
    return (int(height), int(width)) if colours == "YCbCr" else None


def decode_jpeg(data: bytes, size: tuple[int, int], scale_denominator: int = 1) -> np.ndarray | None:
    """RGB, uint8 `[h, w, 3]`, bit for bit as Pillow decodes it; None where libjpeg-turbo has any complaint at all.

    Args:
        data: the encoded file.
        size: what `jpeg_size` said of it.
        shrunk: 1, 2, 4 or 8: decoded so many times smaller, rounded up.
    """
    from simplejpeg import decode_jpeg

    height, width = (-(-side // scale_denominator) for side in size)
    try:
        pixels: np.ndarray = decode_jpeg(data, "RGB", min_height=height, min_width=width)
    except Exception:  # noqa: BLE001 - likewise
        return None
    return pixels


def choose_scale_denominator(size: tuple[int, int], min_size: MinSize) -> int:
    """How many times smaller an image may be decoded and still have so many pixels."""
    if isinstance(min_size, int):
        size, min_size = (min(size), min(size)), (min_size, min_size)
    return next((n for n in _SHRUNK if size[0] >= n * min_size[0] and size[1] >= n * min_size[1]), 1)


def _frame(data: bytes) -> int | None:
    """The marker of the image's header, which tells how it is coded."""
    at = 2 if data.startswith(b"\xff\xd8\xff") else len(data)
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAMES:
            return marker
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None
