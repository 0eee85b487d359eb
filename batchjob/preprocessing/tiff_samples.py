"""Samples of a TIFF file, by the tags of its first image: kinds that are not read are refused by name."""

from __future__ import annotations

import struct
from dataclasses import dataclass

__all__ = ["TiffSamples", "read_tiff_samples"]

_BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANAR, _FORMAT = 258, 259, 262, 277, 284, 339  # tags
_MAX_ENTRIES = 512
_MAX_SAMPLES = 64
_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}  # TIFF types of whole numbers
_WHITE_IS_ZERO = 0
_SEPARATE = 2
_UNCOMPRESSED = 1
_FORMATS = {1: "unsigned", 2: "signed", 3: "floating point", 5: "complex", 6: "complex"}
_COLOURS = {0: "grey", 1: "grey", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "CIE Lab"}


@dataclass(frozen=True)
class TiffSamples:
    """Samples of the first image of a TIFF file.

    Attributes:
        bits: Bits of a sample.
        format: 1 unsigned, 2 signed, 3 floating point, 5 and 6 complex.
        photometric: 0 grey with 0 as white, 1 grey with 0 as black, 2 RGB, and so on.
        count: Samples of a pixel.
        planar: True if each of several samples has a plane of its own.
        compressed: True if they are compressed.
    """

    bits: int
    format: int
    photometric: int
    count: int
    planar: bool
    compressed: bool

    @property
    def is_inverted(self) -> bool:
        """True for grey samples of which the lowest is white."""
        return self.photometric == _WHITE_IS_ZERO

    @property
    def is_misread(self) -> bool:
        """True for samples that Pillow reads wrongly without an error.

        It takes uncompressed planes of 16 bits for planes of 8, signed bytes for unsigned ones, and 0 for black in all
        floats.
        """
        is_signed_byte = self.format == 2 and self.bits == 8
        has_wide_planes = self.planar and self.count > 1 and self.bits > 8 and not self.compressed
        return is_signed_byte or has_wide_planes or (self.is_inverted and self.format == 3)

    @property
    def description(self) -> str:
        """Samples in words, such as `RGB of 3 floating point samples of 32 bits`."""
        colour = _COLOURS.get(self.photometric, f"photometric {self.photometric}")
        inverted = ", of which 0 is white" if self.is_inverted else ""
        planes = ", each in a plane of its own" if self.planar and self.count > 1 else ""
        samples = f"{self.count} {_FORMATS.get(self.format, 'unknown')} sample{'' if self.count == 1 else 's'}"
        return f"{colour} of {samples} of {self.bits} bits{inverted}{planes}"


def read_tiff_samples(data: bytes) -> TiffSamples | None:
    """Read the tags of the first image; None if they are damaged, or lie behind the end of the data."""
    try:
        tags = _read_tags(data)
    except (struct.error, KeyError, OverflowError):
        return None
    if _BITS not in tags and _PHOTOMETRIC not in tags:
        return None
    bits = tags.get(_BITS, [1])
    samples = TiffSamples(
        bits=bits[0],
        format=tags.get(_FORMAT, [1])[0],
        photometric=tags.get(_PHOTOMETRIC, [1])[0],
        count=tags.get(_SAMPLES, [1])[0],
        planar=tags.get(_PLANAR, [1])[0] == _SEPARATE,
        compressed=tags.get(_COMPRESSION, [_UNCOMPRESSED])[0] != _UNCOMPRESSED,
    )
    is_sound = 1 <= samples.bits <= 128 and samples.format in _FORMATS and 1 <= samples.count <= _MAX_SAMPLES
    return samples if is_sound else None


def _read_tags(data: bytes) -> dict[int, list[int]]:
    """Read the tags of whole numbers. Raises struct.error, KeyError or OverflowError."""
    order = {b"II": "<", b"MM": ">"}[data[:2]]
    is_big = 43 in data[2:4]
    number, count_type, entry_size = ("Q", "Q", 20) if is_big else ("I", "H", 12)
    (start,) = struct.unpack_from(order + number, data, 8 if is_big else 4)
    (entries,) = struct.unpack_from(order + count_type, data, start)
    start += struct.calcsize(order + count_type)
    tags = {}
    for index in range(min(entries, _MAX_ENTRIES)):
        at = start + index * entry_size
        tag, kind, count = struct.unpack_from(f"{order}HH{number}", data, at)
        if kind not in _TYPES or not 1 <= count <= _MAX_SAMPLES:
            continue
        values = f"{order}{count}{_TYPES[kind]}"
        place = at + 4 + struct.calcsize(order + number)
        if struct.calcsize(values) > struct.calcsize(order + number):
            (place,) = struct.unpack_from(order + number, data, place)
        tags[tag] = list(struct.unpack_from(values, data, place))
    return tags
