"""Every odd or broken image is exactly one row: a prediction if possible, else stage, type and message of its error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.batchjob_process import read_rows, run_batchjob
from tests.support.tiny_job import encode_image, encode_red_image, write_tiny_job


def encode_rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode_red_image(format="JPEG", exif=exif, quality=95)


def encode_sixteen_bit() -> bytes:
    return encode_image(Image.fromarray(np.full((10, 10), 0x8080, dtype=np.uint16)), format="PNG")


def encode_animated() -> bytes:
    frames = [Image.new("RGB", (10, 10), color) for color in ((255, 0, 51), (0, 255, 0))]
    return encode_image(frames[0], format="GIF", save_all=True, append_images=frames[1:])


def encode_palette() -> bytes:
    image = Image.new("RGB", (10, 10), (255, 0, 51)).convert("P", palette=Image.Palette.ADAPTIVE)
    return encode_image(image, format="PNG")


RED = (1.0, 0.0, 0.2)
GREY = (0.5, 0.5, 0.5)
# Name, bytes (None: no such file), stored width and height, mean colour of the model's input or error.
ODD_IMAGES: list[tuple[str, bytes | None, tuple[int, int] | None, tuple[float, ...] | str]] = [
    ("plain.png", encode_red_image(format="PNG"), (40, 20), RED),
    ("cmyk.jpg", encode_image(Image.new("CMYK", (10, 10), (0, 255, 204, 0)), format="JPEG", quality=95), (10, 10), RED),
    ("sixteen.png", encode_sixteen_bit(), (10, 10), GREY),
    ("palette.png", encode_palette(), (10, 10), RED),
    ("animated.gif", encode_animated(), (10, 10), RED),
    ("rotated.jpg", encode_rotated(), (40, 20), RED),
    ("one.png", encode_image(Image.new("RGB", (1, 1), (255, 0, 51)), format="PNG"), (1, 1), RED),
    ("grey.jpg", encode_image(Image.new("L", (10, 10), 128), format="JPEG"), (10, 10), GREY),
    ("empty.jpg", b"", None, "decode/empty"),
    ("text.jpg", b"this is no image\n", None, "decode/not_an_image"),
    ("truncated.jpg", encode_red_image(format="JPEG")[:-200], None, "decode/truncated"),
    ("missing.jpg", None, None, "fetch/not_found"),
]


@pytest.fixture
def job_folder(tmp_path: Path) -> Path:
    for name, data, _, _ in ODD_IMAGES:
        if data is not None:
            (tmp_path / name).write_bytes(data)
    write_tiny_job(tmp_path, "file\n" + "".join(f"{name}\n" for name, *_ in ODD_IMAGES))
    return tmp_path


def test_odd_image_is_one_row_with_a_prediction_or_an_error(job_folder: Path) -> None:
    ended = run_batchjob("run", "job.yaml", "--json", cwd=job_folder)
    assert ended.exit_code == 0, ended.stderr
    rows = read_rows(job_folder / "out").sort_by("position").to_pylist()
    assert [row["uri"] for row in rows] == [name for name, *_ in ODD_IMAGES]
    for row, (name, _, size, expected) in zip(rows, ODD_IMAGES, strict=True):
        error = f"{row['error_stage']}/{row['error_type']}" if row["error_stage"] else None
        if isinstance(expected, str):
            assert (error, row["embedding"]) == (expected, None), name
            assert row["error_message"], name
        else:
            assert (error, row["error_message"]) == (None, None), name
            assert (row["width"], row["height"]) == size, name
            assert row["embedding"] == pytest.approx(expected, abs=0.02), name
    errors = sum(isinstance(expected, str) for *_, expected in ODD_IMAGES)
    assert ended.json_result.items() >= {"predicted": len(ODD_IMAGES) - errors, "failed": errors}.items()
    counts = run_batchjob("errors", "out", "--json", cwd=job_folder).json_result
    assert counts["total"] == errors
    assert counts["by_type"] == dict.fromkeys((e for *_, e in ODD_IMAGES if isinstance(e, str)), 1)
