"""Decoder: Pillow's pixels for good images, an error of a known type for bad ones, and never anything else."""

from __future__ import annotations

import base64
import gzip
import importlib.util
import io
import os
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

from batchjob.errors import ImageError, InvalidJob
from batchjob.preprocessing.decode import decode
from batchjob.preprocessing.image_formats import register_decoders
from batchjob.preprocessing.settings import DecodeSettings

MODES: tuple[Literal["exact", "fast"], ...] = ("exact", "fast")
ERROR_TYPES = {"empty", "not_an_image", "unsupported", "truncated", "corrupt", "too_large", "memory"}


def make_noise(mode: str, size: tuple[int, int] = (37, 23)) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(7).integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    return Image.frombytes(mode, size, values.tobytes())


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def decode_error(data: bytes, **settings: Any) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode(data, DecodeSettings(**settings), "rgb", False)
    assert caught.value.stage == "decode"
    return caught.value


def decode_pixels(data: bytes, channels: Any = "rgb", exif: bool = False) -> np.ndarray:
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
def test_ordinary_images_equal_pillows_conversion(mode: str, format: str) -> None:
    image = (
        make_noise("L").convert("1")
        if mode == "1"
        else make_noise("RGB").convert("P")
        if mode == "P"
        else make_noise(mode)
    )
    data = encode(image, format)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    decoded = decode(data, DecodeSettings(), "rgb", False)
    np.testing.assert_array_equal(decoded.pixels, expected)
    assert (decoded.width, decoded.height) == (37, 23)
    assert decoded.pixels.dtype == np.uint8
    assert decoded.pixels.flags.writeable
    np.testing.assert_array_equal(decode_pixels(data, "bgr"), expected)
    assert decode_pixels(data, "gray").shape == (23, 37, 1)


def test_gray_of_a_gray_image_is_unchanged() -> None:
    image = make_noise("L")
    np.testing.assert_array_equal(decode_pixels(encode(image, "PNG"), "gray")[:, :, 0], np.asarray(image))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled_and_not_clipped(format: str) -> None:
    samples = np.array([[0, 128, 257, 32768, 65535]], dtype=np.uint16)
    pixels = decode_pixels(encode(Image.fromarray(samples), format))
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 0, 1, 128, 255])
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


def test_float_and_32_bit_samples_are_scaled_by_their_values() -> None:
    floats = np.array([[0.0, 0.5, 1.0, np.nan]], dtype=np.float32)
    np.testing.assert_array_equal(decode_pixels(encode(Image.fromarray(floats), "TIFF"))[0, :, 0], [0, 128, 255, 0])
    np.testing.assert_array_equal(
        decode_pixels(encode(Image.fromarray(floats * 200), "TIFF"), "gray")[0, :, 0], [0, 100, 200, 0]
    )
    integers = np.array([[-5, 100, 255]], dtype=np.int32)
    np.testing.assert_array_equal(decode_pixels(encode(Image.fromarray(integers), "TIFF"))[0, :, 0], [0, 100, 255])
    np.testing.assert_array_equal(
        decode_pixels(encode(Image.fromarray(integers * 257), "TIFF"))[0, :, 0], [0, 100, 255]
    )
    error = decode_error(encode(Image.fromarray(integers * 258), "TIFF"))
    assert (error.type, "up to 65,790" in error.message) == ("unsupported", True)


def test_first_frame_of_an_animation_is_decoded() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert decode_pixels(data)[0, 0].tolist() == [255, 0, 0], kind


def test_exif_orientation_is_applied_only_if_asked_for() -> None:
    image, exif = make_noise("RGB"), Image.Exif()
    exif[0x0112] = 6
    data = encode(image, "PNG", exif=exif)
    np.testing.assert_array_equal(decode_pixels(data), np.asarray(image))
    np.testing.assert_array_equal(decode_pixels(data, exif=True), np.rot90(np.asarray(image), -1))
    turned = decode(data, DecodeSettings(), "rgb", True)
    assert (turned.width, turned.height) == (37, 23), "the size is the one in the file"


def test_all_eight_orientations_become_upright(test_data: Path) -> None:
    for shape in ("Landscape", "Portrait"):
        first = decode_pixels((test_data / "hostile" / "exif" / f"{shape}_1.jpg").read_bytes(), exif=True)
        for number in range(2, 9):
            other = decode_pixels((test_data / "hostile" / "exif" / f"{shape}_{number}.jpg").read_bytes(), exif=True)
            assert other.shape == first.shape
            assert np.abs(other.astype(int) - first).mean() < 12, f"{shape}_{number}"


def test_files_under_the_name_of_an_image_are_named() -> None:
    jpeg, png = encode(make_noise("RGB"), "JPEG"), encode(make_noise("RGB"), "PNG")
    for data, words in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer; run `git lfs pull`"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><html>", "a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a store (AccessDenied)"),
        (b'{"error": "not found"}', "a JSON document"),
        (base64.b64encode(jpeg), "base64"),
        (base64.b64encode(png), "base64"),
        (png.replace(b"\r\n", b"\n"), "copied as text"),
        (jpeg.decode("utf-8", "replace").encode(), "copied as text"),
        (jpeg.decode("latin-1").encode(), "copied as text"),
        (gzip.compress(jpeg), "compressed by gzip"),
        (bytes(5000), "nothing but zeros"),
        (b"PK\3\4" + jpeg, "zip://::FILE"),
    ):
        error = decode_error(data)
        assert error.type == "not_an_image"
        assert words in error.message
    for data, words in (
        (bytes(128) + b"DICM" + jpeg, "DICOM"),
        (b"\0\0\0\x20ftypisom" + bytes(100), "a video"),
        (b"\0\0\0\x18ftypheic" + bytes(100), "HEIF, which is not among decode.formats"),
    ):
        error = decode_error(data)
        assert error.type == "unsupported"
        assert words in error.message
    assert "SVG" in decode_error(b'<?xml version="1.0"?>\n<svg width="1"/>').message


def test_bad_files_have_one_of_the_error_types() -> None:
    jpeg, png = encode(make_noise("RGB", (200, 200)), "JPEG"), encode(make_noise("RGB", (200, 200)), "PNG")
    assert decode_error(b"").type == "empty"
    assert decode_error(b"hello, this is text").type == "not_an_image"
    assert decode_error(jpeg[: len(jpeg) // 2]).type == "truncated"
    assert decode_error(png[: len(png) // 2]).type == "truncated"
    assert decode_error(encode(make_noise("RGB"), "BMP")[:-500]).type == "truncated"
    assert decode_error(jpeg[:20]).type in {"corrupt", "truncated"}
    assert decode_error(png[:60] + bytes(200) + png[260:]).type == "corrupt"
    assert decode_error(encode(make_noise("LAB"), "TIFF")).type == "unsupported"
    for kind, name in (("JPEG2000", "JPEG 2000"), ("ICO", "icon"), ("PPM", "Netpbm"), ("AVIF", "AVIF")):
        error = decode_error(encode(make_noise("RGB"), kind))
        assert error.type == "unsupported"
        assert name in error.message
        assert "JPEG, PNG" in error.message


def test_limits_are_enforced_and_named() -> None:
    png = encode(Image.new("RGB", (100, 60)), "PNG")
    for limit in (5999, 2000):  # Pillow itself raises an error at twice the limit
        error = decode_error(png, max_pixels=limit)
        assert error.type == "too_large"
        assert f"decode.max_pixels {limit:,}" in error.message
    assert decode(png, DecodeSettings(max_pixels=6000), "rgb", False).pixels.shape == (60, 100, 3)
    error = decode_error(png, max_bytes=len(png) - 1)
    assert error.type == "too_large"
    assert "decode.max_bytes" in error.message


def test_pillow_settings_of_the_program_neither_count_nor_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    jpeg = encode(make_noise("RGB", (200, 200)), "JPEG")
    assert decode_pixels(jpeg).shape == (200, 200, 3)
    assert decode_error(jpeg[: len(jpeg) // 2]).type == "truncated"
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
        except ImageError as error:
            assert error.stage == "decode" and error.message, path
            counts[error.type] += 1
print("\\n".join(f"{name} {count}" for name, count in counts.items()))
"""


def test_every_hostile_file_is_decoded_or_an_image_error_and_nothing_is_printed(test_data: Path) -> None:
    folder = test_data / "hostile"
    call = [sys.executable, "-c", HOSTILE, str(folder)]
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""
    counts = Counter({name: int(count) for name, count in (line.split() for line in done.stdout.splitlines())})
    print(dict(counts))
    assert counts.total() == sum(path.is_file() for path in folder.rglob("*"))
    assert set(counts) <= ERROR_TYPES | {"ok"}
    assert counts["ok"] > 1500


@pytest.mark.parametrize("size", [(37, 23), (16, 16), (1, 1), (3, 250), (129, 65)])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(("mode", "subsampling"), [("RGB", 0), ("RGB", 1), ("RGB", 2), ("L", 0), ("CMYK", 0)])
def test_all_kinds_of_jpeg_equal_pillow(size: tuple[int, int], progressive: bool, mode: str, subsampling: int) -> None:
    data = encode(make_noise(mode, size), "JPEG", progressive=progressive, subsampling=subsampling, quality=80)
    with Image.open(io.BytesIO(data)) as image:
        converted = image.convert("RGB")
        np.testing.assert_array_equal(decode_pixels(data), np.array(converted))
        gray = image if image.mode == "L" else converted.convert("L")
        np.testing.assert_array_equal(decode_pixels(data, "gray")[:, :, 0], np.array(gray))


@pytest.mark.parametrize("orientation", range(10))
def test_jpeg_orientation_equals_pillow(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(make_noise("RGB"), "JPEG", exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        upright = np.array(ImageOps.exif_transpose(image))
    for mode in MODES:
        decoded = decode(data, DecodeSettings(mode=mode), "rgb", True)
        np.testing.assert_array_equal(decoded.pixels, upright)
        assert (decoded.width, decoded.height) == (37, 23)
        assert decoded.axes_swapped == (5 <= orientation <= 8)


def test_damaged_jpegs_have_the_errors_of_pillow_alone(test_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted(path for path in (test_data / "hostile").rglob("*") if path.is_file())
    jpegs = [data for path in files if (data := path.read_bytes()).startswith(b"\xff\xd8")][::5]
    assert len(jpegs) > 500
    ours = [decode_or_error(data) for data in jpegs]
    monkeypatch.setattr("batchjob.preprocessing.decode.read_jpeg_size", lambda _: None)
    assert ours == [decode_or_error(data) for data in jpegs]


def decode_or_error(data: bytes) -> tuple[str, str] | bytes:
    try:
        return decode(data, DecodeSettings(max_pixels=30_000_000), "rgb", True).pixels.tobytes()
    except ImageError as error:
        return error.type, error.message


@pytest.mark.parametrize(
    ("min_size", "shape"),
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
def test_fast_decodes_large_jpegs_at_a_reduced_size(
    min_size: int | tuple[int, int] | None, shape: tuple[int, int]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = make_noise("RGB", (8, 6)).resize((800, 600))
    jpeg, png, turned = encode(image, "JPEG"), encode(image, "PNG"), encode(image, "JPEG", exif=exif)
    fast, exact = DecodeSettings(mode="fast"), DecodeSettings()
    small = decode(jpeg, fast, "rgb", False, min_size)
    assert small.pixels.shape == (*shape, 3)
    assert (small.width, small.height) == (800, 600)
    assert decode(jpeg, fast, "gray", False, min_size).pixels.shape == (*shape, 1)
    upright = min_size[::-1] if isinstance(min_size, tuple) else min_size
    sideways = decode(turned, fast, "rgb", True, upright)
    assert (sideways.pixels.shape, sideways.axes_swapped) == ((*shape[::-1], 3), True)
    assert decode(jpeg, exact, "rgb", False, min_size).pixels.shape == (600, 800, 3)
    assert decode(png, fast, "rgb", False, min_size).pixels.shape == (600, 800, 3)
    area = np.asarray(image.resize(shape[::-1], Image.Resampling.BOX)).astype(int)
    assert np.abs(small.pixels - area).mean() < 2


@pytest.mark.parametrize("min_size", [None, 20])
def test_fast_keeps_limits_and_errors(min_size: int | None) -> None:
    jpeg = encode(make_noise("RGB", (200, 200)), "JPEG")
    with pytest.raises(ImageError, match="ends too early"):
        decode(jpeg[: len(jpeg) // 2], DecodeSettings(mode="fast"), "rgb", False, min_size)
    with pytest.raises(ImageError, match="over decode"):
        decode(jpeg, DecodeSettings(mode="fast", max_pixels=39_999), "rgb", False, min_size)


def test_photographs_equal_pillow(test_data: Path) -> None:
    for path in sorted((test_data / "imagenet-sample").glob("*.JPEG"))[:40]:
        with Image.open(path) as image:
            np.testing.assert_array_equal(decode_pixels(path.read_bytes()), np.array(image.convert("RGB")))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("format", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("GIF", {}), ("BMP", {})],
    ids=str,
)
def test_truncated_file_is_accepted_if_the_job_allows_it(
    mode: Literal["exact", "fast"], format: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = encode(make_noise("RGB", (200, 200)), format, **options)
    truncated = complete[: len(complete) // 2]
    assert decode_error(truncated, mode=mode).type == "truncated"
    accepting = DecodeSettings(mode=mode, truncated="accept")
    decoded = decode(truncated, accepting, "rgb", True, min_size=20)
    assert (decoded.width, decoded.height, decoded.pixels.shape) == (200, 200, (200, 200, 3))
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with Image.open(io.BytesIO(truncated)) as image:
        np.testing.assert_array_equal(decoded.pixels, np.array(image.convert("RGB")))
    monkeypatch.undo()
    exact = DecodeSettings(truncated="accept")
    np.testing.assert_array_equal(decode(complete, exact, "rgb", False).pixels, decode_pixels(complete))


def test_file_without_a_size_is_an_error_even_if_truncated_files_are_accepted() -> None:
    for data in (b"", b"\xff\xd8\xff", encode(make_noise("RGB"), "PNG")[:12], b"hello, this is text"):
        assert decode_error(data, truncated="accept").type in ERROR_TYPES


def test_threads_with_different_settings_do_not_disturb_each_other() -> None:
    complete = encode(make_noise("RGB", (400, 400)), "PNG")
    truncated, tiff = complete[: len(complete) // 2], encode(make_noise("RGB", (64, 64)), "TIFF")
    cases: list[tuple[bytes, dict[str, Any], str]] = [
        (truncated, {"truncated": "accept"}, "ok"),
        (truncated, {"truncated": "error"}, "truncated"),
        (truncated, {"truncated": "accept", "max_pixels": 100_000}, "too_large"),
        (tiff, {}, "ok"),
    ]

    def decode_one(number: int) -> str:
        data, settings, _ = cases[number % len(cases)]
        try:
            decode(data, DecodeSettings(**settings), "rgb", False)
        except ImageError as error:
            return error.type
        return "ok"

    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(decode_one, range(400))) == [cases[number % len(cases)][2] for number in range(400)]
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before
    assert os.fstat(2).st_ino != Path(os.devnull).stat().st_ino, "standard error is restored"


def test_only_formats_of_the_job_are_read() -> None:
    jpeg, png = encode(make_noise("RGB"), "JPEG"), encode(make_noise("RGB"), "PNG")
    error = decode_error(png, formats=("jpeg",))
    assert (error.type, error.message) == ("unsupported", "the file is PNG, which is not among decode.formats: JPEG")
    assert decode(jpeg, DecodeSettings(formats=("jpeg",)), "rgb", False).pixels.shape == (23, 37, 3)
    error = decode_error(jpeg, formats=("png", "webp"))
    assert error.type == "unsupported"
    assert error.message == "the file is JPEG, which is not among decode.formats: PNG and WebP"
    assert DecodeSettings(formats=("webp", "png", "webp")).formats == ("png", "webp"), "one order, so one fingerprint"
    for other in ("GIF", "BMP", "TIFF", "WEBP"):
        assert decode_error(encode(make_noise("RGB"), other), formats=("png", "jpeg")).type == "unsupported"


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read_if_it_is_named() -> None:
    data = encode(make_noise("RGB"), "AVIF")
    assert decode_error(data).message.startswith("the file is AVIF, which is not among decode.formats: JPEG, PNG")
    both = DecodeSettings(formats=("jpeg", "avif"))
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(decode(data, both, "rgb", False).pixels, np.array(image.convert("RGB")))
    error = decode_error(data, formats=("avif",), max_pixels=37 * 23 - 1)
    assert error.type == "too_large"
    assert decode_error(data[: len(data) // 2], formats=("avif",)).type in ERROR_TYPES


def test_heif_is_read_if_it_is_named_and_installed() -> None:
    if importlib.util.find_spec("pillow_heif") is None:
        with pytest.raises(InvalidJob, match=r"names heif, which needs another package: .*pip install 'pillow-heif"):
            DecodeSettings(formats=("jpeg", "heif"))
        pytest.skip("no pillow-heif here")
    heif = DecodeSettings(formats=("jpeg", "heif"))
    decode(encode(make_noise("RGB"), "JPEG"), heif, "rgb", False)
    smooth = make_noise("RGB", (4, 4)).resize((64, 48))
    register_decoders(("heif",))
    data = encode(smooth, "HEIF", quality=-1)
    assert decode_error(data).message.startswith("the file is HEIF, ")
    decoded = decode(data, heif, "rgb", False)
    assert (decoded.width, decoded.height) == (64, 48)
    assert np.abs(decoded.pixels.astype(int) - np.asarray(smooth)).mean() < 8
    assert decode_error(data, formats=("heif",), max_pixels=64 * 48 - 1).type == "too_large"
    assert decode_error(data[: len(data) // 2], formats=("heif",)).type in ERROR_TYPES


def test_pillow_without_avif_is_an_error_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check", lambda _: False)
    with pytest.raises(InvalidJob, match="names avif, which this Pillow was built without; install a wheel of"):
        DecodeSettings(formats=("avif",))


def make_bombs() -> dict[str, bytes]:
    """Make small files whose headers declare huge images."""
    side = 60_000
    png = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b""))):
        png += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    jpeg = bytearray(encode(make_noise("RGB"), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    gif = bytearray(encode(make_noise("RGB"), "GIF"))
    gif[6:10] = struct.pack("<HH", side, side)
    bmp = bytearray(encode(make_noise("RGB"), "BMP"))
    bmp[18:26] = struct.pack("<ii", side, side)
    tags = ((256, side), (257, side), (258, 8), (259, 1), (262, 1), (273, 8), (278, side), (279, 1))
    tiff = b"II*\x00\x08\x00\x00\x00" + struct.pack("<H", len(tags))
    tiff += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags) + bytes(4)
    webp = encode(make_noise("RGB"), "WEBP", lossless=True)[12:]
    webp = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (side - 1).to_bytes(3, "little") * 2 + webp
    webp = b"RIFF" + struct.pack("<I", 4 + len(webp)) + b"WEBP" + webp
    return {"png": png, "jpeg": bytes(jpeg), "gif": bytes(gif), "bmp": bytes(bmp), "tiff": tiff, "webp": webp}


def test_small_files_with_huge_sizes_are_refused_by_their_headers() -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for truncated in ("error", "accept"):
        for name, data in make_bombs().items():
            error = decode_error(data, truncated=truncated)
            assert (name, error.type) == (name, "too_large"), error.message
            assert "over decode.max_pixels" in error.message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10, "KiB more than before"
