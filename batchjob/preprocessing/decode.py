"""Decodes an encoded image to uint8 pixels; a bad image raises ImageError and nothing else.

Ordinary JPEG files go through libjpeg-turbo alone, everything else through Pillow.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from batchjob.errors import ImageError
from batchjob.preprocessing.image_formats import (
    ImageFormat,
    explain_non_image,
    format_list,
    pillow_names,
    register_decoders,
    sniff_format,
)
from batchjob.preprocessing.jpeg import MinSize, choose_scale_denominator, decode_jpeg, read_jpeg_size
from batchjob.preprocessing.png_chunks import keep_pixel_chunks
from batchjob.preprocessing.settings import DecodeSettings
from batchjob.preprocessing.tiff_samples import TiffSamples, read_tiff_samples

__all__ = ["DecodedImage", "decode"]

_SIGNATURE_BYTES = 160  # from the beginning of a file, to recognise its format
_ORIENTATION_TAG = 0x0112  # EXIF
_BITS_PER_SAMPLE_TAG, _PHOTOMETRIC_TAG, _SAMPLE_FORMAT_TAG = 258, 262, 339  # TIFF
_LAST_UNSWAPPED = 4  # orientations above it swap width and height
_TRUNCATION_WORDS = ("truncated", "unexpected end", "premature", "not enough")  # in Pillow's messages

# EXIF orientation → the transposition that turns the image upright.
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class DecodedImage:
    """Pixels of an image, and its size in the file.

    Attributes:
        pixels: uint8 `[h, w, c]`: RGB, or one grey channel.
        width: Stored width of the image at full size, in pixels.
        height: Stored height of the image at full size, in pixels.
        axes_swapped: True where EXIF turned the image by a quarter, so that the pixels have the two sides swapped.
        scale_denominator: Factor by which the pixels were decoded smaller.
    """

    pixels: np.ndarray
    width: int
    height: int
    axes_swapped: bool = False
    scale_denominator: int = 1

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width of the upright image at full size."""
        return (self.width, self.height) if self.axes_swapped else (self.height, self.width)


def decode(
    data: bytes,
    settings: DecodeSettings,
    channels: Literal["rgb", "bgr", "gray"],
    apply_exif: bool,
    min_size: MinSize | None = None,
) -> DecodedImage:
    """Decode one image; of an animation the first frame.

    The result is that of `Image.open(...).convert("RGB")`: alpha is dropped, palettes and CMYK are converted. 16-bit
    grey is scaled to 8 bits. 32-bit integers count as 16-bit if any value is over 255; floats count as 0-1 if no
    value is over 1, else as 0-255; higher values have no known white and are refused. Text, colour profiles and other
    parts of a PNG file on which no pixel depends may be damaged or too large.

    Args:
        data: Encoded file.
        settings: Limits of the decoder, and the exactness of its pixels.
        channels: `gray` gives one channel; `rgb` and `bgr` both give RGB, since the order changes on the device.
        apply_exif: Turn the image upright, following its EXIF orientation.
        min_size: In mode `fast`, pixels of the upright image that are needed: shorter side, or height and width. All
            if None.

    Raises:
        ImageError: Stage `decode`; type `empty`, `not_an_image`, `unsupported`, `truncated`, `corrupt`, `too_large` or
            `memory`.
    """
    if not data:
        raise _decode_error("empty", "the file is empty")
    if len(data) > settings.max_bytes:
        raise _decode_error(
            "too_large", f"the file has {len(data):,} bytes, over decode.max_bytes {settings.max_bytes:,}"
        )
    if "jpeg" in settings.formats:
        decoded = _decode_plain_jpeg(
            data, settings, channels, apply_exif, min_size if settings.mode == "fast" else None
        )
        if decoded is not None:
            return decoded
    is_tiff = sniff_format(data[:_SIGNATURE_BYTES])[0] == "tiff"
    tiff = read_tiff_samples(data) if is_tiff else None
    if tiff is not None and tiff.is_misread and "tiff" in settings.formats:
        raise _unread_samples(tiff)
    with _limit_pillow(settings), _silence_stderr() if is_tiff else contextlib.nullcontext():
        result = _try_pillow(data, settings, channels, apply_exif, tiff)
        if isinstance(result, ImageError) and result.type not in {"too_large", "memory"}:
            pixel_chunks = keep_pixel_chunks(data)
            if pixel_chunks is not None:
                result = _try_pillow(pixel_chunks, settings, channels, apply_exif)
    if isinstance(result, ImageError):
        raise result
    return result


def _try_pillow(
    data: bytes, settings: DecodeSettings, channels: str, apply_exif: bool, tiff: TiffSamples | None = None
) -> DecodedImage | ImageError:
    """Decode by Pillow, and return the error of a file that cannot be decoded."""
    try:
        return _decode_with_pillow(data, settings, channels, apply_exif)
    except ImageError as error:
        return error
    except MemoryError:
        return _decode_error("memory", "there was not enough memory to decode it")
    except Exception as error:  # noqa: BLE001 - any exception of Pillow over a file is a fault of that file
        return _classify_error(error, data, settings, tiff)


def _read_jpeg_orientation(data: bytes, settings: DecodeSettings) -> int:
    """Read the EXIF orientation of a JPEG file: 1 to 8, 1 is upright. Raises any exception of Pillow."""
    with _limit_pillow(settings), Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        return _read_orientation(image)


def _decode_plain_jpeg(
    data: bytes, settings: DecodeSettings, channels: str, apply_exif: bool, min_size: MinSize | None
) -> DecodedImage | None:
    """Decode an ordinary JPEG file by libjpeg-turbo; None leaves the file and its error message to Pillow."""
    size = read_jpeg_size(data)
    if size is None or size[0] * size[1] > settings.max_pixels:
        return None
    try:
        orientation = _read_jpeg_orientation(data, settings) if apply_exif else 1
    except Exception:  # noqa: BLE001 - Pillow decodes the file next and names the error
        return None
    axes_swapped = orientation > _LAST_UNSWAPPED
    if axes_swapped and isinstance(min_size, tuple):
        min_size = min_size[1], min_size[0]
    scale_denominator = 1 if min_size is None else choose_scale_denominator(size, min_size)
    pixels = decode_jpeg(data, size, scale_denominator)
    if pixels is None:
        return None
    if channels == "gray" or orientation != 1:
        image = Image.fromarray(pixels)
        pixels = np.array(_turn_upright(_convert_mode(image, "L" if channels == "gray" else "RGB"), orientation))
    return DecodedImage(_add_channel_axis(pixels), size[1], size[0], axes_swapped, scale_denominator)


def _decode_with_pillow(data: bytes, settings: DecodeSettings, channels: str, apply_exif: bool) -> DecodedImage:
    register_decoders(settings.formats)
    with Image.open(io.BytesIO(data), formats=pillow_names(settings.formats)) as image:
        width, height = image.size
        if width * height > settings.max_pixels:
            message = f"{width}x{height} pixels, over decode.max_pixels {settings.max_pixels:,}"
            raise _decode_error("too_large", message)
        image.load()
        upright = _turn_upright(image, _read_orientation(image)) if apply_exif else image
        pixels = np.array(_convert_mode(upright, "L" if channels == "gray" else "RGB"))
    if pixels.size == 0:
        raise _decode_error("corrupt", f"it has no pixels: {width}x{height}")
    return DecodedImage(_add_channel_axis(pixels), width, height, axes_swapped=pixels.shape[1] != width)


def _add_channel_axis(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _convert_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to mode RGB or L, in steps that Pillow supports."""
    if image.mode == mode:
        return image
    if image.mode.startswith(("I", "F")):
        image = _scale_to_8_bits(image)
    elif image.mode in {"RGBa", "La"}:  # premultiplied alpha: Pillow converts it only to the straight form
        image = image.convert(image.mode[:-1] + "A")
    elif image.mode == "LAB":
        raise _decode_error("unsupported", "its colours are CIE Lab, which is not read; convert it to RGB")
    if mode == "L" and image.mode not in {"1", "L", "LA"}:
        image = image.convert("RGB")
    return image.convert(mode)


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale grey samples of more than 8 bits to 8 bits."""
    samples = np.asarray(image)
    if samples.dtype.kind == "f":
        samples = np.nan_to_num(samples, nan=0.0, posinf=0.0, neginf=0.0)
        if samples.max(initial=0.0) > 255.0:
            raise _no_known_white(f"floating point samples up to {samples.max():,.6g}")
        scaled = samples * 255.0 if samples.max(initial=0.0) <= 1.0 else samples
        return Image.fromarray(np.rint(scaled.clip(0, 255)).astype(np.uint8))
    if image.mode == "I" and _get_tag(image, _SAMPLE_FORMAT_TAG, (1,))[0] == 1 and hasattr(image, "tag_v2"):
        samples = samples.view(np.uint32)  # Pillow holds unsigned samples as signed ones
    if image.mode == "I" and samples.max(initial=0) > 65535:
        kind = "signed" if samples.dtype.kind == "i" else "unsigned"
        raise _no_known_white(f"{kind} samples of 32 bits up to {samples.max():,}")
    # Rounded and not shifted, so that white stays white at every depth.
    white = _find_white_level(image, int(samples.max(initial=0)))
    wide = samples.clip(0, white).astype(np.uint32)
    # Pillow inverts 8 bits itself.
    if image.mode.startswith("I;16") and _get_tag(image, _PHOTOMETRIC_TAG, 1) == 0:
        wide = white - wide
    return Image.fromarray(((wide * 255 + white // 2) // white).astype(np.uint8))


def _find_white_level(image: Image.Image, largest: int) -> int:
    """Find the sample value that means white: the largest of the file's depth."""
    if image.mode == "I":
        return 65535 if largest > 255 else 255
    bits = _get_tag(image, _BITS_PER_SAMPLE_TAG, (16,))
    return (1 << bits[0]) - 1 if bits[0] in {9, 10, 12, 14} and largest < 1 << bits[0] else 65535


def _get_tag(image: Image.Image, tag: int, default: Any) -> Any:
    """Return a tag of a TIFF image; the default for images of other formats."""
    tags = getattr(image, "tag_v2", None)
    return default if tags is None else tags.get(tag, default)


def _no_known_white(samples: str) -> ImageError:
    return _decode_error("unsupported", f"{samples}, of which none is known to be white; convert it to 8 bits")


def _turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TRANSPOSITIONS[orientation]) if orientation in _TRANSPOSITIONS else image


def _read_orientation(image: ImageFile.ImageFile) -> int:
    """Read the EXIF orientation: 1 to 8, 1 is upright. It is 1 for TIFF, which Pillow always turns as it loads."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # noqa: BLE001 - a damaged EXIF block says nothing about orientation; the pixels are fine
        return 1
    if not isinstance(orientation, int) or image.format == "TIFF":
        return 1
    return orientation if 1 <= orientation <= 8 else 1


# -- Pillow's state of the whole process -------------------------------------------------------------------------


class _PillowLimits:
    """Pillow's process-wide limits, set by the first thread that decodes and restored by the last.

    Threads with the same limits decode at the same time; a thread with other limits waits for them to finish.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users, self._values = 0, (0, False)
        self._previous: tuple[int | None, bool] = (None, False)
        self._warnings = contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self, max_pixels: int, accept_truncated: bool) -> Iterator[None]:
        """Set the limits, and silence Python warnings, for the length of the block."""
        values = max_pixels, accept_truncated
        with self._changed:
            self._changed.wait_for(lambda: not self._users or self._values == values)
            if not self._users:
                self._values, self._previous = values, (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
                Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = values
                self._warnings.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                if not self._users:
                    self._warnings.close()
                    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = self._previous
                    self._changed.notify_all()


_pillow_limits = _PillowLimits()
_stderr_lock = threading.Lock()


def _limit_pillow(settings: DecodeSettings) -> contextlib.AbstractContextManager[None]:
    """Set Pillow's limits to those of the job, whatever the rest of the process has set."""
    return _pillow_limits(settings.max_pixels, settings.truncated == "accept")


@contextlib.contextmanager
def _silence_stderr() -> Iterator[None]:
    """Discard file descriptor 2: libtiff writes its warnings there, and reports them by an exception as well."""
    with _stderr_lock:
        try:
            saved = os.dup(2)
        except OSError:  # a process without a standard error
            yield
            return
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(saved, 2)
                os.close(saved)


# -- errors ------------------------------------------------------------------------------------------------------


def _classify_error(
    error: Exception, data: bytes, settings: DecodeSettings, tiff: TiffSamples | None = None
) -> ImageError:
    """Convert an exception of Pillow into one of our error types."""
    text = " ".join(str(error).split())[:200]
    if isinstance(error, UnidentifiedImageError):
        if tiff is not None and "tiff" in settings.formats:
            return _unread_samples(tiff)
        return _classify_unidentified(data, settings.formats)
    if isinstance(error, Image.DecompressionBombError):
        size = re.search(r"\d+", text)
        pixels = f"{int(size[0]):,} pixels" if size else "an image"
        return _decode_error("too_large", f"{pixels}, over decode.max_pixels {settings.max_pixels:,}")
    if isinstance(error, EOFError) or any(word in text.lower() for word in _TRUNCATION_WORDS):
        return _decode_error("truncated", f"the file ends too early{_quote_detail(text)}")
    if isinstance(error, NotImplementedError) or "not supported" in text or "unsupported" in text.lower():
        return _decode_error("unsupported", f"a variant that is not read: {text}")
    return _decode_error("corrupt", f"{type(error).__name__}: {text}" if text else type(error).__name__)


def _quote_detail(text: str) -> str:
    """Return ` (…)` with the words of a message that say more than that a file is truncated; else nothing.

    Example: "Truncated File Read" says nothing more; "image file is truncated (12 bytes not processed)" does.
    """
    detail = re.search(r"\(([^()]*\d[^()]*)\)", text)
    return f" ({detail[1]})" if detail else ""


def _unread_samples(samples: TiffSamples) -> ImageError:
    return _decode_error(
        "unsupported", f"a TIFF of {samples.description}, which is not read; convert it to 8 bits, or grey to 16"
    )


def _classify_unidentified(data: bytes, formats: Sequence[ImageFormat]) -> ImageError:
    readable, unreadable = sniff_format(data[:_SIGNATURE_BYTES])
    if readable in formats:
        return _decode_error("corrupt", "the header of the file is damaged")
    if readable is not None:
        return _decode_error(
            "unsupported",
            f"the file is {format_list([readable])}, which is not among decode.formats: {format_list(formats)}",
        )
    if unreadable is not None:
        return _decode_error("unsupported", f"the file is {unreadable}; {format_list(formats)} are read")
    if (found := explain_non_image(data)) is not None:
        return _decode_error("not_an_image", f"the file is {found}")
    return _decode_error("not_an_image", f"no image in any of the formats that are read: {format_list(formats)}")


def _decode_error(type: str, message: str) -> ImageError:
    return ImageError("decode", type, message)
