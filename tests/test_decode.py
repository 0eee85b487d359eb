"""Bytes to pixels: what Pillow gives for good images, one of a few words for bad ones, never anything else."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import struct
import subprocess
import sys
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, features

from batchjob.errors import ImageError
from batchjob.preprocessing.decode import decode
from batchjob.preprocessing.image_formats import register_decoders
from batchjob.preprocessing.settings import DecodeSettings

MODES: tuple[Literal["exact", "fast"], ...] = ("exact", "fast")
TYPES = {"empty", "not_an_image", "unsupported", "truncated", "corrupt", "too_large", "memory"}


def noise(mode: str, size: tuple[int, int] = (37, 23)) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(7).integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    return Image.frombytes(mode, size, values.tobytes())


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def fault_of(data: bytes, **settings: Any) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode(data, DecodeSettings(**settings), "rgb", False)
    assert caught.value.stage == "decode"
    return caught.value


def pixels_of(data: bytes, channels: Any = "rgb", exif: bool = False) -> np.ndarray:
    return decode(data, DecodeSettings(), channels, exif).pixels


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        *((mode, "JPEG") for mode in ("L", "RGB", "CMYK")),
        *((mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *((mode, "TIFF") for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")),
        *((mode, "WEBP") for mode in ("RGB", "RGBA")),
        *((mode, "GIF") for mode in ("L", "P", "RGB")),
        *((mode, "BMP") for mode in ("L", "P", "RGB")),
    ],
)
def test_ordinary_images_are_what_pillow_converts(mode: str, format: str) -> None:
    image = noise("L").convert("1") if mode == "1" else noise("RGB").convert("P") if mode == "P" else noise(mode)
    data = encoded(image, format)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    decoded = decode(data, DecodeSettings(), "rgb", False)
    np.testing.assert_array_equal(decoded.pixels, expected)
    assert (decoded.width, decoded.height) == (37, 23)
    assert decoded.pixels.dtype == np.uint8
    assert decoded.pixels.flags.writeable
    np.testing.assert_array_equal(pixels_of(data, "bgr"), expected)
    assert pixels_of(data, "gray").shape == (23, 37, 1)


def test_gray_of_a_gray_image_is_untouched() -> None:
    image = noise("L")
    np.testing.assert_array_equal(pixels_of(encoded(image, "PNG"), "gray")[:, :, 0], np.asarray(image))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_grey_of_16_bits_is_scaled_not_clipped(format: str) -> None:
    samples = np.array([[0, 128, 257, 32768, 65535]], dtype=np.uint16)
    pixels = pixels_of(encoded(Image.fromarray(samples), format))
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 0, 1, 128, 255])
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


def test_wider_samples_are_scaled_by_what_they_hold() -> None:
    floats = np.array([[0.0, 0.5, 1.0, np.nan]], dtype=np.float32)
    np.testing.assert_array_equal(pixels_of(encoded(Image.fromarray(floats), "TIFF"))[0, :, 0], [0, 128, 255, 0])
    np.testing.assert_array_equal(
        pixels_of(encoded(Image.fromarray(floats * 200), "TIFF"), "gray")[0, :, 0], [0, 100, 200, 0]
    )
    integers = np.array([[-5, 100, 255]], dtype=np.int32)
    np.testing.assert_array_equal(pixels_of(encoded(Image.fromarray(integers), "TIFF"))[0, :, 0], [0, 100, 255])
    np.testing.assert_array_equal(pixels_of(encoded(Image.fromarray(integers * 257), "TIFF"))[0, :, 0], [0, 100, 255])


def test_of_an_animation_the_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert pixels_of(data)[0, 0].tolist() == [255, 0, 0], kind


def test_exif_orientation_turns_the_image_only_where_asked() -> None:
    image, exif = noise("RGB"), Image.Exif()
    exif[0x0112] = 6
    data = encoded(image, "PNG", exif=exif)
    np.testing.assert_array_equal(pixels_of(data), np.asarray(image))
    np.testing.assert_array_equal(pixels_of(data, exif=True), np.rot90(np.asarray(image), -1))
    turned = decode(data, DecodeSettings(), "rgb", True)
    assert (turned.width, turned.height) == (37, 23), "the size is the one the file stores"


def test_all_eight_orientations_come_out_upright(test_data: Path) -> None:
    for shape in ("Landscape", "Portrait"):
        first = pixels_of((test_data / "hostile" / "exif" / f"{shape}_1.jpg").read_bytes(), exif=True)
        for number in range(2, 9):
            other = pixels_of((test_data / "hostile" / "exif" / f"{shape}_{number}.jpg").read_bytes(), exif=True)
            assert other.shape == first.shape
            assert np.abs(other.astype(int) - first).mean() < 12, f"{shape}_{number}"


def test_bad_files_are_named_by_a_few_words() -> None:
    jpeg, png = encoded(noise("RGB", (200, 200)), "JPEG"), encoded(noise("RGB", (200, 200)), "PNG")
    assert fault_of(b"").type == "empty"
    assert fault_of(b"hello, this is text").type == "not_an_image"
    assert fault_of(jpeg[: len(jpeg) // 2]).type == "truncated"
    assert fault_of(png[: len(png) // 2]).type == "truncated"
    assert fault_of(encoded(noise("RGB"), "BMP")[:-500]).type == "truncated"
    assert fault_of(jpeg[:20]).type in {"corrupt", "truncated"}
    assert fault_of(png[:60] + bytes(200) + png[260:]).type == "corrupt"
    assert fault_of(encoded(noise("LAB"), "TIFF")).type == "unsupported"
    for kind, name in (("JPEG2000", "JPEG 2000"), ("ICO", "icon"), ("PPM", "Netpbm"), ("AVIF", "AVIF")):
        fault = fault_of(encoded(noise("RGB"), kind))
        assert fault.type == "unsupported"
        assert name in fault.message
        assert "JPEG, PNG" in fault.message


def test_limits_hold_and_are_named() -> None:
    png = encoded(Image.new("RGB", (100, 60)), "PNG")
    for limit in (5999, 2000):  # Pillow itself speaks up at twice the limit
        fault = fault_of(png, max_pixels=limit)
        assert fault.type == "too_large"
        assert f"decode.max_pixels {limit:,}" in fault.message
    assert decode(png, DecodeSettings(max_pixels=6000), "rgb", False).pixels.shape == (60, 100, 3)
    fault = fault_of(png, max_bytes=len(png) - 1)
    assert fault.type == "too_large"
    assert "decode.max_bytes" in fault.message


def test_settings_of_the_program_neither_count_nor_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    jpeg = encoded(noise("RGB", (200, 200)), "JPEG")
    assert pixels_of(jpeg).shape == (200, 200, 3)
    assert fault_of(jpeg[: len(jpeg) // 2]).type == "truncated"
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == (10, True)


HOSTILE = """
import collections, pathlib, sys, warnings
warnings.simplefilter("error")
from batchjob.preprocessing.decode import decode
from batchjob.preprocessing.settings import DecodeSettings
from batchjob.errors import ImageError
counts = collections.Counter()
for path in pathlib.Path(sys.argv[1]).rglob("*"):
    if path.is_file():
        try:
            pixels = decode(path.read_bytes(), DecodeSettings(max_pixels=30_000_000), "rgb", True).pixels
            assert pixels.dtype == "uint8" and pixels.shape[2] == 3 and pixels.size, path
            counts["ok"] += 1
        except ImageError as fault:
            assert fault.stage == "decode" and fault.message, path
            counts[fault.type] += 1
print("\\n".join(f"{name} {count}" for name, count in counts.items()))
"""


def test_every_hostile_file_is_an_image_or_a_fault_and_nothing_is_printed(test_data: Path) -> None:
    folder = test_data / "hostile"
    call = [sys.executable, "-c", HOSTILE, str(folder)]
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""
    counts = Counter({name: int(count) for name, count in (line.split() for line in done.stdout.splitlines())})
    print(dict(counts))
    assert counts.total() == sum(path.is_file() for path in folder.rglob("*"))
    assert set(counts) <= TYPES | {"ok"}
    assert counts["ok"] > 1500


@pytest.mark.parametrize("size", [(37, 23), (16, 16), (1, 1), (3, 250), (129, 65)])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(("mode", "subsampling"), [("RGB", 0), ("RGB", 1), ("RGB", 2), ("L", 0), ("CMYK", 0)])
def test_jpeg_files_of_all_kinds_are_what_pillow_reads(
    size: tuple[int, int], progressive: bool, mode: str, subsampling: int
) -> None:
    data = encoded(noise(mode, size), "JPEG", progressive=progressive, subsampling=subsampling, quality=80)
    with Image.open(io.BytesIO(data)) as image:
        converted = image.convert("RGB")
        np.testing.assert_array_equal(pixels_of(data), np.array(converted))
        gray = image if image.mode == "L" else converted.convert("L")
        np.testing.assert_array_equal(pixels_of(data, "gray")[:, :, 0], np.array(gray))


@pytest.mark.parametrize("orientation", range(10))
def test_jpeg_files_are_turned_as_pillow_turns_them(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise("RGB"), "JPEG", exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        upright = np.array(ImageOps.exif_transpose(image))
    for mode in MODES:
        decoded = decode(data, DecodeSettings(mode=mode), "rgb", True)
        np.testing.assert_array_equal(decoded.pixels, upright)
        assert (decoded.width, decoded.height) == (37, 23)
        assert decoded.axes_swapped == (5 <= orientation <= 8)


def test_damage_is_named_as_if_pillow_alone_had_read(test_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted(path for path in (test_data / "hostile").rglob("*") if path.is_file())
    jpegs = [data for path in files if (data := path.read_bytes()).startswith(b"\xff\xd8")][::5]
    assert len(jpegs) > 500
    ours = [outcome(data) for data in jpegs]
    monkeypatch.setattr("batchjob.preprocessing.decode.read_jpeg_size", lambda _: None)
    assert ours == [outcome(data) for data in jpegs]


def outcome(data: bytes) -> tuple[str, str] | bytes:
    try:
        return decode(data, DecodeSettings(max_pixels=30_000_000), "rgb", True).pixels.tobytes()
    except ImageError as fault:
        return fault.type, fault.message


@pytest.mark.parametrize(
    ("least", "shape"),
    [
        (256, (300, 400)),
        (150, (150, 200)),
        (300, (300, 400)),
        (301, (600, 800)),
        (75, (75, 100)),
        (1, (75, 100)),
        ((300, 300), (300, 400)),
        ((100, 300), (300, 400)),
        ((100, 200), (150, 200)),
        (None, (600, 800)),
    ],
)
def test_fast_decodes_large_jpegs_to_what_is_needed(
    least: int | tuple[int, int] | None, shape: tuple[int, int]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = noise("RGB", (8, 6)).resize((800, 600))
    jpeg, png, turned = encoded(image, "JPEG"), encoded(image, "PNG"), encoded(image, "JPEG", exif=exif)
    fast, exact = DecodeSettings(mode="fast"), DecodeSettings()
    small = decode(jpeg, fast, "rgb", False, least)
    assert small.pixels.shape == (*shape, 3)
    assert (small.width, small.height) == (800, 600)
    assert decode(jpeg, fast, "gray", False, least).pixels.shape == (*shape, 1)
    upright = least[::-1] if isinstance(least, tuple) else least
    sideways = decode(turned, fast, "rgb", True, upright)
    assert (sideways.pixels.shape, sideways.axes_swapped) == ((*shape[::-1], 3), True)
    assert decode(jpeg, exact, "rgb", False, least).pixels.shape == (600, 800, 3)
    assert decode(png, fast, "rgb", False, least).pixels.shape == (600, 800, 3)
    area = np.asarray(image.resize(shape[::-1], Image.Resampling.BOX)).astype(int)
    assert np.abs(small.pixels - area).mean() < 2


@pytest.mark.parametrize("least", [None, 20])
def test_fast_keeps_the_limits_and_the_faults(least: int | None) -> None:
    jpeg = encoded(noise("RGB", (200, 200)), "JPEG")
    with pytest.raises(ImageError, match="ends too early"):
        decode(jpeg[: len(jpeg) // 2], DecodeSettings(mode="fast"), "rgb", False, least)
    with pytest.raises(ImageError, match="over decode"):
        decode(jpeg, DecodeSettings(mode="fast", max_pixels=39_999), "rgb", False, least)


def test_photographs_are_what_pillow_reads(test_data: Path) -> None:
    for path in sorted((test_data / "imagenet-sample").glob("*.JPEG"))[:40]:
        with Image.open(path) as image:
            np.testing.assert_array_equal(pixels_of(path.read_bytes()), np.array(image.convert("RGB")))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("format", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("GIF", {}), ("BMP", {})],
    ids=str,
)
def test_a_truncated_file_is_accepted_where_the_job_says_so(
    mode: Literal["exact", "fast"], format: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encoded(noise("RGB", (200, 200)), format, **options)
    torn = whole[: len(whole) // 2]
    assert fault_of(torn, mode=mode).type == "truncated"
    accepting = DecodeSettings(mode=mode, truncated="accept")
    decoded = decode(torn, accepting, "rgb", True, min_size=20)
    assert (decoded.width, decoded.height, decoded.pixels.shape) == (200, 200, (200, 200, 3))
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with Image.open(io.BytesIO(torn)) as image:
        np.testing.assert_array_equal(decoded.pixels, np.array(image.convert("RGB")))
    monkeypatch.undo()
    exact = DecodeSettings(truncated="accept")
    np.testing.assert_array_equal(decode(whole, exact, "rgb", False).pixels, pixels_of(whole))


def test_what_has_no_size_is_a_fault_also_where_truncated_files_are_accepted() -> None:
    for data in (b"", b"\xff\xd8\xff", encoded(noise("RGB"), "PNG")[:12], b"hello, this is text"):
        assert fault_of(data, truncated="accept").type in TYPES


def test_threads_with_different_settings_do_not_meet() -> None:
    whole = encoded(noise("RGB", (400, 400)), "PNG")
    torn, tiff = whole[: len(whole) // 2], encoded(noise("RGB", (64, 64)), "TIFF")
    ways: list[tuple[bytes, dict[str, Any], str]] = [
        (torn, {"truncated": "accept"}, "ok"),
        (torn, {"truncated": "error"}, "truncated"),
        (torn, {"truncated": "accept", "max_pixels": 100_000}, "too_large"),
        (tiff, {}, "ok"),
    ]

    def attempt(number: int) -> str:
        data, settings, _ = ways[number % len(ways)]
        try:
            decode(data, DecodeSettings(**settings), "rgb", False)
        except ImageError as fault:
            return fault.type
        return "ok"

    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(attempt, range(400))) == [ways[number % len(ways)][2] for number in range(400)]
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before
    assert os.fstat(2).st_ino != Path(os.devnull).stat().st_ino, "standard error is back where it was"


def test_only_the_formats_of_the_job_are_read() -> None:
    jpeg, png = encoded(noise("RGB"), "JPEG"), encoded(noise("RGB"), "PNG")
    fault = fault_of(png, formats=("jpeg",))
    assert (fault.type, fault.message) == ("unsupported", "the file is PNG, which is not among decode.formats: JPEG")
    assert decode(jpeg, DecodeSettings(formats=("jpeg",)), "rgb", False).pixels.shape == (23, 37, 3)
    fault = fault_of(jpeg, formats=("png", "webp"))
    assert fault.type == "unsupported"
    assert fault.message == "the file is JPEG, which is not among decode.formats: PNG and WebP"
    assert DecodeSettings(formats=("webp", "png", "webp")).formats == ("png", "webp"), "one order, one fingerprint"
    for other in ("GIF", "BMP", "TIFF", "WEBP"):
        assert fault_of(encoded(noise("RGB"), other), formats=("png", "jpeg")).type == "unsupported"


@pytest.mark.skipif(not features.check("avif"), reason="a Pillow without AVIF")
def test_avif_is_read_where_it_is_named() -> None:
    data = encoded(noise("RGB"), "AVIF")
    assert fault_of(data).message.startswith("the file is AVIF, which is not among decode.formats: JPEG, PNG")
    both = DecodeSettings(formats=("jpeg", "avif"))
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(decode(data, both, "rgb", False).pixels, np.array(image.convert("RGB")))
    fault = fault_of(data, formats=("avif",), max_pixels=37 * 23 - 1)
    assert fault.type == "too_large"
    assert fault_of(data[: len(data) // 2], formats=("avif",)).type in TYPES


def test_heif_is_read_where_it_is_named_and_installed() -> None:
    if importlib.util.find_spec("pillow_heif") is None:
        with pytest.raises(
            ValueError, match=re.escape("names heif, which needs an extra: pip install 'batchjob[heif]'")
        ):
            DecodeSettings(formats=("jpeg", "heif"))
        pytest.skip("no pillow-heif here")
    heif = DecodeSettings(formats=("jpeg", "heif"))
    decode(encoded(noise("RGB"), "JPEG"), heif, "rgb", False)
    smooth = noise("RGB", (4, 4)).resize((64, 48))
    register_decoders(("heif",))
    data = encoded(smooth, "HEIF", quality=-1)
    assert fault_of(data).message.startswith("the file is HEIF, ")
    decoded = decode(data, heif, "rgb", False)
    assert (decoded.width, decoded.height) == (64, 48)
    assert np.abs(decoded.pixels.astype(int) - np.asarray(smooth)).mean() < 8
    assert fault_of(data, formats=("heif",), max_pixels=64 * 48 - 1).type == "too_large"
    assert fault_of(data[: len(data) // 2], formats=("heif",)).type in TYPES


def test_a_pillow_without_avif_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check", lambda _: False)
    with pytest.raises(ValueError, match="names avif, which this Pillow was built without; install a wheel of"):
        DecodeSettings(formats=("avif",))


def bombs() -> dict[str, bytes]:
    """Small files that say they are huge."""
    side = 60_000
    png = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b""))):
        png += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    jpeg = bytearray(encoded(noise("RGB"), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    gif = bytearray(encoded(noise("RGB"), "GIF"))
    gif[6:10] = struct.pack("<HH", side, side)
    bmp = bytearray(encoded(noise("RGB"), "BMP"))
    bmp[18:26] = struct.pack("<ii", side, side)
    tags = ((256, side), (257, side), (258, 8), (259, 1), (262, 1), (273, 8), (278, side), (279, 1))
    tiff = b"II*\x00\x08\x00\x00\x00" + struct.pack("<H", len(tags))
    tiff += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags) + bytes(4)
    webp = encoded(noise("RGB"), "WEBP", lossless=True)[12:]
    webp = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (side - 1).to_bytes(3, "little") * 2 + webp
    webp = b"RIFF" + struct.pack("<I", 4 + len(webp)) + b"WEBP" + webp
    return {"png": png, "jpeg": bytes(jpeg), "gif": bytes(gif), "bmp": bytes(bmp), "tiff": tiff, "webp": webp}


def test_small_files_that_unpack_to_gigabytes_are_refused_by_their_headers() -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for truncated in ("error", "accept"):
        for name, data in bombs().items():
            fault = fault_of(data, truncated=truncated)
            assert (name, fault.type) == (name, "too_large"), fault.message
            assert "over decode.max_pixels" in fault.message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10, "KiB beyond what was held before"
