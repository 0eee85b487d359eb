"""Bytes to uint8 pixels, for a short list of formats: a bad image becomes an `ImageFault`, nothing else.

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
from typing import TYPE_CHECKING, Literal

from batchjob.errors import ImageError
from batchjob.preprocessing.image_formats import ImageFormat, format_list, pillow_names, register_decoders, sniff_format
from batchjob.preprocessing.jpeg import MinSize, choose_scale_denominator, decode_jpeg, read_jpeg_size
from batchjob.preprocessing.settings import DecodeSettings

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from PIL.ImageFile import ImageFile

__all__ = ["DecodedImage", "decode", "read_jpeg_orientation"]

_ORIENTATION = 0x0112
_LAST_UNTURNED = 4  # orientations above it swap width and height
_SAMPLE_BITS = 258  # TIFF tag BitsPerSample
_TORN = ("truncated", "unexpected end", "premature", "not enough")  # Pillow's words for a file that ends too early


@dataclass(frozen=True)
class DecodedImage:
    """`pixels` uint8 `[h, w, c]` (RGB, or one grey channel), and the size in pixels as the file stores it.

    With `turned`, EXIF has swapped width and height; and it was decoded `shrunk` times smaller than these two say.
    """

    pixels: np.ndarray
    width: int
    height: int
    axes_swapped: bool = False
    scale_denominator: int = 1

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width of the image as it stands, all of its pixels counted."""
        return (self.width, self.height) if self.axes_swapped else (self.height, self.width)


def decode(
    data: bytes,
    settings: DecodeSettings,
    channels: Literal["rgb", "bgr", "gray"],
    apply_exif: bool,
    min_size: MinSize | None = None,
) -> DecodedImage:
    """Decode one image; of an animation the first frame.

    For ordinary images this is `Image.open(...).convert("RGB")`: alpha is dropped, palettes and CMYK are converted.
    Grey of 16 bits is scaled to 8; 32-bit integers count as 16 bits if any value is over 255; floats as 0-1 if none
    is over 1, else as 0-255.

    Args:
        data: the encoded file.
        settings: limits.
        channels: `gray` gives one channel; `rgb` and `bgr` both give RGB (the order is changed on the device).
        exif: turn the image as its EXIF orientation says.
        least: in mode `fast`, pixels of the upright image that are needed (shorter side, or height and width); all
            where not given.

    Raises:
        ImageFault: stage `decode`, of type `empty`, `not_an_image`, `unsupported`, `truncated`, `corrupt`,
            `too_large` or `memory`.
    """
    if not data:
        raise _fault("empty", "the file is empty")
    if len(data) > settings.max_bytes:
        raise _fault("too_large", f"the file has {len(data):,} bytes, over decode.max_bytes {settings.max_bytes:,}")
    if "jpeg" in settings.formats:
        quick = _jpeg(data, settings, channels, apply_exif, min_size if settings.mode == "fast" else None)
        if quick is not None:
            return quick
    with _ruled(settings), _deaf() if sniff_format(data[:64])[0] == "tiff" else contextlib.nullcontext():
        try:
            return _decode(data, settings, channels, apply_exif)
        except ImageError:
            raise
        except MemoryError:
            raise _fault("memory", "there was not enough memory to decode it") from None
        except Exception as error:  # noqa: BLE001 - whatever Pillow meets in a file is a fault of that file
            raise _classify(error, data, settings) from None


def _jpeg(
    data: bytes, settings: DecodeSettings, channels: str, exif: bool, least: MinSize | None
) -> DecodedImage | None:
    """An ordinary JPEG file by libjpeg-turbo; None leaves the file, and all there is to say of it, to Pillow."""
    import numpy as np
    from PIL import Image

    size = read_jpeg_size(data)
    if size is None or size[0] * size[1] > settings.max_pixels:
        return None
    try:
        orientation = read_jpeg_orientation(data, settings) if exif else 1
    except Exception:  # noqa: BLE001 - Pillow, when its turn comes, says what it is
        return None
    turned = orientation > _LAST_UNTURNED
    if turned and isinstance(least, tuple):
        least = least[1], least[0]
    shrunk = 1 if least is None else choose_scale_denominator(size, least)
    pixels = decode_jpeg(data, size, shrunk)
    if pixels is None:
        return None
    if channels == "gray" or orientation != 1:
        image = Image.fromarray(pixels)
        pixels = np.array(_turned(_converted(image, "L" if channels == "gray" else "RGB"), orientation))
    return DecodedImage(_channelled(pixels), size[1], size[0], turned, shrunk)


def _decode(data: bytes, settings: DecodeSettings, channels: str, exif: bool) -> DecodedImage:
    import numpy as np
    from PIL import Image

    register_decoders(settings.formats)
    with Image.open(io.BytesIO(data), formats=pillow_names(settings.formats)) as image:
        width, height = image.size
        if width * height > settings.max_pixels:
            raise _fault("too_large", f"{width}x{height} pixels, over decode.max_pixels {settings.max_pixels:,}")
        image.load()
        upright = _turned(image, _orientation(image)) if exif else image
        pixels = np.array(_converted(upright, "L" if channels == "gray" else "RGB"))
    if pixels.size == 0:
        raise _fault("corrupt", f"it has no pixels: {width}x{height}")
    return DecodedImage(_channelled(pixels), width, height, axes_swapped=pixels.shape[1] != width)


def _channelled(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """The image in mode RGB or L, by way of what Pillow can convert."""
    if image.mode == mode:
        return image
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    elif image.mode in {"RGBa", "La"}:  # premultiplied: Pillow converts only to the straight form
        image = image.convert(image.mode[:-1] + "A")
    elif image.mode == "LAB":
        raise _fault("unsupported", "its colours are CIE Lab, which is not read; convert it to RGB")
    if mode == "L" and image.mode not in {"1", "L", "LA"}:
        image = image.convert("RGB")
    return image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey samples of more than 8 bits, scaled to 8."""
    import numpy as np
    from PIL import Image

    samples = np.asarray(image)
    if samples.dtype.kind == "f":
        samples = np.nan_to_num(samples, nan=0.0, posinf=np.inf, neginf=0.0)
        scaled = samples * 255.0 if samples.max(initial=0.0) <= 1.0 else samples
        return Image.fromarray(np.rint(scaled.clip(0, 255)).astype(np.uint8))
    # Rounded, not shifted, so that white stays white whatever the depth.
    top = _top_sample(image, int(samples.max(initial=0)))
    wide = samples.clip(0, top).astype(np.uint32)
    return Image.fromarray(((wide * 255 + top // 2) // top).astype(np.uint8))


def _top_sample(image: Image.Image, largest: int) -> int:
    """The sample value that means white."""
    if image.mode == "I":
        return 65535 if largest > 255 else 255
    tags = getattr(image, "tag_v2", None)
    bits = tags.get(_SAMPLE_BITS, (16,)) if tags is not None else (16,)
    return (1 << bits[0]) - 1 if bits[0] in {9, 10, 12, 14} and largest < 1 << bits[0] else 65535


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    """Upright, where EXIF gives it this orientation."""
    from PIL import Image

    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def _orientation(image: ImageFile) -> int:
    """1 to 8 as EXIF counts; 1 is upright. TIFF is turned by Pillow as it loads, with or without being asked."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # noqa: BLE001 - a damaged EXIF block says nothing about orientation; the pixels are fine
        return 1
    if not isinstance(orientation, int) or image.format == "TIFF":
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def read_jpeg_orientation(data: bytes, settings: DecodeSettings) -> int:
    """1 to 8 as EXIF counts; 1 is upright. Raises whatever Pillow meets in the file."""
    from PIL import Image

    with _ruled(settings), Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        return _orientation(image)


class _PillowLimits:
    """Pillow's switches belong to the whole process. The first thread that decodes sets them, the last puts them back.

    Threads of one job decode side by side; one that goes by other rules waits for them to end.
    """

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._users, self._values = 0, (0, False)
        self._before: tuple[int | None, bool] = (None, False)
        self._silence = contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self, max_pixels: int, accept: bool) -> Iterator[None]:
        from PIL import Image, ImageFile

        values = max_pixels, accept
        with self._turn:
            self._turn.wait_for(lambda: not self._users or self._values == values)
            if not self._users:
                self._values, self._before = values, (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
                Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = values
                self._silence.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            self._users += 1
        try:
            yield
        finally:
            with self._turn:
                self._users -= 1
                if not self._users:
                    self._silence.close()
                    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = self._before
                    self._turn.notify_all()


_rules = _PillowLimits()
_deafness = threading.Lock()


def _ruled(settings: DecodeSettings) -> contextlib.AbstractContextManager[None]:
    """Pillow under our limits and without a word, whatever the process around has set."""
    return _rules(settings.max_pixels, settings.truncated == "accept")


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """libtiff writes its complaints straight to file descriptor 2; what they mean comes back as an exception too."""
    with _deafness:
        try:
            kept = os.dup(2)
        except OSError:  # a process without a standard error
            yield
            return
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(kept, 2)
                os.close(kept)


def _classify(error: Exception, data: bytes, settings: DecodeSettings) -> ImageError:
    """What an exception from Pillow means, in our few words."""
    from PIL import Image, UnidentifiedImageError

    text = " ".join(str(error).split())[:200]
    if isinstance(error, UnidentifiedImageError):
        return _unidentified(data, settings.formats)
    if isinstance(error, Image.DecompressionBombError):
        size = re.search(r"\d+", text)
        pixels = f"{int(size[0]):,} pixels" if size else "an image"
        return _fault("too_large", f"{pixels}, over decode.max_pixels {settings.max_pixels:,}")
    if any(word in text.lower() for word in _TORN):
        return _fault("truncated", f"the file ends too early: {text}")
    if isinstance(error, EOFError):
        return _fault("truncated", "the file ends too early")
    if isinstance(error, NotImplementedError) or "not supported" in text or "unsupported" in text.lower():
        return _fault("unsupported", f"a variant that is not read: {text}")
    return _fault("corrupt", f"{type(error).__name__}: {text}" if text else type(error).__name__)


def _unidentified(data: bytes, formats: Sequence[ImageFormat]) -> ImageError:
    kind, other = sniff_format(data[:64])
    if kind in formats:
        return _fault("corrupt", "the header of the file is damaged")
    if kind is not None:
        return _fault(
            "unsupported",
            f"the file is {format_list([kind])}, which is not among decode.formats: {format_list(formats)}",
        )
    if other is not None:
        return _fault("unsupported", f"the file is {other}; {format_list(formats)} are read")
    return _fault("not_an_image", f"no image in any of the formats that are read: {format_list(formats)}")


def _fault(type: str, message: str) -> ImageError:
    return ImageError("decode", type, message)
