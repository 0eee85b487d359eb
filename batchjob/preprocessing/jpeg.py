"""Ordinary JPEG files through libjpeg-turbo. Unusual and damaged files are left to Pillow, which is more tolerant."""

from __future__ import annotations

import numpy as np
import simplejpeg

__all__ = ["MinSize", "choose_scale_denominator", "decode_jpeg", "read_jpeg_size"]

MinSize = int | tuple[int, int]
"""Pixels that are needed: of the shorter side, or height and width."""

_COLOR_SPACES = {"Gray", "YCbCr"}  # Pillow converts the others differently
# Markers of frame headers (ITU-T T.81, table B.1), for coding by cosine transform. A lossless file may have samples
# of any number of bits.
_DCT_FRAMES = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}
_NOT_FRAMES = {0xC4, 0xC8, 0xCC}  # other segments whose markers lie among those of frames
_FAST_DENOMINATORS = (8, 4, 2)  # the reductions at which libjpeg is fast


def read_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Read height and width of a file that `decode_jpeg` may be able to decode; None of all others."""
    if _find_frame_marker(data) not in _DCT_FRAMES:
        return None
    height, width, color_space = _read_header(data)
    return (height, width) if color_space in _COLOR_SPACES else None


def decode_jpeg(data: bytes, size: tuple[int, int], scale_denominator: int = 1) -> np.ndarray | None:
    """Decode a file to the pixels that Pillow gives, bit for bit.

    Args:
        data: Encoded file.
        size: Height and width from `read_jpeg_size`.
        scale_denominator: Factor to decode the image smaller by: 1, 2, 4 or 8; sides are rounded up.

    Returns:
        RGB, uint8 `[h, w, 3]`; None where libjpeg-turbo reports anything about the file.
    """
    height, width = (-(-side // scale_denominator) for side in size)
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    except Exception:  # noqa: BLE001 - Pillow finds the same fault in the file, and names it
        return None
    return pixels


def choose_scale_denominator(size: tuple[int, int], min_size: MinSize) -> int:
    """Choose the largest reduction that still leaves the pixels that are needed.

    Example: a resize to a shorter side of 256 needs 256 pixels; 1200x1600 can be decoded at a quarter, 300x400.
    """
    if isinstance(min_size, int):
        size, min_size = (min(size), min(size)), (min_size, min_size)
    return next((n for n in _FAST_DENOMINATORS if size[0] >= n * min_size[0] and size[1] >= n * min_size[1]), 1)


def _read_header(data: bytes) -> tuple[int, int, str | None]:
    """Read height, width and colour space; the colour space of an unreadable header is None."""
    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(data)
    except Exception:  # noqa: BLE001 - Pillow finds the same fault in the file, and names it
        return 0, 0, None
    return int(height), int(width), color_space


def _find_frame_marker(data: bytes) -> int | None:
    """Find the marker of the frame header, which tells how the image is coded.

    A file is a chain of segments: FF, marker, length in two bytes (itself included), content. Example: FF D8 (start),
    FF E0 00 10 + 14 bytes (JFIF), FF C0 … (baseline frame).
    """
    at = 2 if data.startswith(b"\xff\xd8\xff") else len(data)
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in _NOT_FRAMES:
            return marker
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None
