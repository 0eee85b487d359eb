"""Image formats that a job can name: their signatures, their names in Pillow and in text, and their availability."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

from batchjob.system import install_command

__all__ = [
    "DEFAULT_FORMATS",
    "FORMATS",
    "ImageFormat",
    "explain_non_image",
    "format_list",
    "pillow_names",
    "register_decoders",
    "sniff_format",
    "unavailable_reason",
]

ImageFormat = Literal["jpeg", "png", "webp", "gif", "bmp", "tiff", "avif", "heif"]

DEFAULT_FORMATS: tuple[ImageFormat, ...] = ("jpeg", "png", "webp", "gif", "bmp", "tiff")
FORMATS: tuple[ImageFormat, ...] = (*DEFAULT_FORMATS, "avif", "heif")

_DISPLAY_NAMES = {"jpeg": "JPEG", "png": "PNG", "webp": "WebP", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF"}

# Signatures: offset in the file, bytes there.
_TIFF_SIGNATURES = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+", b"II\x00*", b"MM*\x00")
_SIGNATURES: dict[ImageFormat, tuple[tuple[int, bytes], ...]] = {
    "jpeg": ((0, b"\xff\xd8\xff"),),
    "png": ((0, b"\x89PNG\r\n\x1a\n"),),
    "webp": ((8, b"WEBP"),),
    "gif": ((0, b"GIF8"),),
    "bmp": ((0, b"BM"),),
    "tiff": tuple((0, signature) for signature in _TIFF_SIGNATURES),
    "avif": ((4, b"ftypavi"),),
    "heif": ((4, b"ftyphe"), (4, b"ftypmif1"), (4, b"ftypmsf1")),
}
_OTHER_SIGNATURES = (
    (0, b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (0, b"8BPS", "Photoshop"),
    (0, b"\x00\x00\x01\x00", "an icon"),
    (0, b"\x00\x00\x02\x00", "a cursor or TGA"),
    (0, b"icns", "an icon"),
    (0, b"DDS ", "DDS"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"qoif", "QOI"),
    (128, b"DICM", "DICOM"),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"PAR1", "Parquet"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"FUJIFILMCCD-RAW", "a raw photograph"),
    (4, b"ftypcrx", "a raw photograph"),
    *((0, b"II" + mark, "a raw photograph") for mark in (b"RO", b"RS", b"U\x00")),
    *((4, b"ftyp" + brand, "a video") for brand in (b"isom", b"iso2", b"mp4", b"avc1", b"qt  ", b"M4V", b"3gp")),
    (8, b"AVI LIST", "a video"),
    (0, b"\x1a\x45\xdf\xa3", "a video"),
    (0, b"\x01\xda", "SGI"),
    (0, b"<svg", "SVG"),
    *((0, b"P" + digit, "Netpbm") for digit in (b"1\n", b"2\n", b"3\n", b"4\n", b"5\n", b"6\n")),
)

_AS_TEXT = "an image that was copied as text, which changed its bytes; copy it there again, as binary"
# First bytes of files that are often found under the name of an image -> what they are, and what to do.
_NON_IMAGES = {
    b"version https://git-lfs": "a Git LFS pointer; run `git lfs pull` where it came from",
    b"\x89PNG\n": _AS_TEXT,
    b"\x89PNG\r\r\n": _AS_TEXT,
    b"\xef\xbf\xbdPNG": _AS_TEXT,
    b"\xef\xbf\xbd" * 3: _AS_TEXT,
    b"\xc3\xbf\xc3\x98\xc3\xbf": _AS_TEXT,
    b"\xc2\x89PNG": _AS_TEXT,
    b"/9j/": "an image in base64; decode it",
    b"iVBORw0KGgo": "an image in base64; decode it",
    b"data:image/": "an image as a data: URL; decode it",
    b"\x00\x05\x16\x07": "an AppleDouble file of a Mac; leave it out",
    b"\x00\x05\x16\x00": "an AppleDouble file of a Mac; leave it out",
    b"PK\x03\x04": "a zip archive; name what is in it, as in zip://::FILE",
    b"\x1f\x8b": "compressed by gzip; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it",
    b"\xfd7zXZ\x00": "compressed by xz; unpack it",
    b"BZh": "compressed by bzip2; unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"Rar!": "a RAR archive; unpack it",
}
_TEXT_BYTES = 1024  # looked at for a web page and the like

_registration_lock = threading.Lock()


def pillow_names(formats: Sequence[ImageFormat]) -> tuple[str, ...]:
    """Translate format names to Pillow's."""
    return tuple(name.upper() for name in formats)


def format_list(formats: Sequence[ImageFormat]) -> str:
    """Write formats as part of a sentence: `JPEG, PNG and WebP`."""
    *most, last = [_DISPLAY_NAMES.get(name, name.upper()) for name in formats]
    return f"{', '.join(most)} and {last}" if most else last


def explain_non_image(data: bytes) -> str | None:
    """Say what a file is that holds no image, as the rest of `the file is …`, with what to do; None if unknown."""
    if not data.strip(b"\0"):
        return "nothing but zeros; copy it there again"
    for prefix, found in _NON_IMAGES.items():
        if data.startswith(prefix):
            return found
    if data[257:262] == b"ustar":
        return "a tar archive; name what is in it, as in tar://::FILE"
    start = data[:_TEXT_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip()
    lower = start.lower()
    if lower.startswith(b"<") and b"<svg" in lower:
        return "SVG; draw it as PNG"
    if lower.startswith((b"<!doctype html", b"<html")):
        return "a web page; download the file itself"
    if lower.startswith((b"<?xml", b"<error")):
        code = re.search(rb"<Code>(\w{1,60})</Code>", start)
        named = f"an error answer of a store ({code[1].decode()})" if code else "an XML document"
        return f"{named}; download the file itself"
    return "a JSON document; download the file itself" if re.match(rb'[\[{]\s*["{}\[\]]', start) else None


def sniff_format(data: bytes) -> tuple[ImageFormat | None, str | None]:
    """Recognise a file by its first bytes.

    Returns:
        The format and None if batchjob can read it; None and a name if it is a known format that batchjob cannot
        read; (None, None) if the bytes are unknown.
    """
    for name, signatures in _SIGNATURES.items():
        if any(data.startswith(signature, offset) for offset, signature in signatures):
            return name, None
    return None, next((name for offset, magic, name in _OTHER_SIGNATURES if data.startswith(magic, offset)), None)


# Job settings use this file, and a job is read without Pillow, so the two functions below import it when called.


def unavailable_reason(format: ImageFormat) -> str | None:
    """Explain why this installation cannot read a format, as the rest of `heif, which …`; None where it can."""
    if format == "heif" and find_spec("pillow_heif") is None:
        return f"needs another package: {install_command('heif', 'pillow-heif')}"
    if format == "avif":
        from PIL import features

        if not features.check("avif"):
            return "this Pillow was built without; install a wheel of Pillow 11.3 or newer"
    return None


def register_decoders(formats: Sequence[ImageFormat]) -> None:
    """Register the decoders that Pillow does not find by itself. Repeated calls do nothing."""
    if "heif" not in formats:
        return
    from PIL import Image

    with _registration_lock:
        if "HEIF" not in Image.OPEN:
            import_module("pillow_heif").register_heif_opener(thumbnails=False)
