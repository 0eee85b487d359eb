"""JPEG decoding on the GPU: complete batches in order, and refused files decoded on the CPU.

The decoder of the device is torchvision's decoder for the CPU, except in one test that needs a GPU.
"""

from __future__ import annotations

import io
import logging
import multiprocessing
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from batchjob_process import read_rows
from harmful_job import CUDA_ASSERT
from jpeg_files import (
    CENTER_CROP,
    PLAIN_JPEG,
    UNSUITABLE_FILES,
    decode_files,
    encode_jpeg,
    make_photograph,
    make_split_transform,
)
from PIL import Image

from batchjob import Job, run
from batchjob.errors import AttemptFailed, BatchjobError, DeviceFault, InvalidJob
from batchjob.inference.gpu_decode import GpuDecodingLoader, JpegDecoder, create_jpeg_decoder
from batchjob.loader.gpu_share import GpuShareController, GpuSplitTransform
from batchjob.loader.loader import Loader
from batchjob.loader.settings import LoaderConfig
from batchjob.loader.shard_queue import ShardQueue
from batchjob.preprocessing.settings import DecodeSettings, Preprocess
from batchjob.preprocessing.transforms import ImageTransform, ResizeCrop
from batchjob.storage.reader import Reader
from batchjob.types import Batch, ImageRef, Shard, ShardKey

CPU = torch.device("cpu")

# -- batches ---------------------------------------------------------------------------------------------------


def write_shard(folder: Path, contents: Sequence[bytes]) -> Shard:
    for number, content in enumerate(contents):
        (folder / f"{number:03d}").write_bytes(content)
    refs = tuple(ImageRef(n, f"{n:03d}", str(folder / f"{n:03d}")) for n in range(len(contents)))
    return Shard(ShardKey(0, "0" * 16, len(refs), 0, 0), refs, pa.table({}))


class DecodingSetup:
    """Loader with GPU decoding by a given decoder, in place of a device."""

    def __init__(
        self,
        decode: JpegDecoder,
        value: float,
        processes: int = 0,
        preprocess: Preprocess = CENTER_CROP,
        batch_size: int = 4,
    ) -> None:
        prepare = make_split_transform(value, preprocess)
        self.share = prepare.share

        def loader(processes: int, split_transform: GpuSplitTransform | None = None) -> Loader:
            plan = LoaderConfig(processes, 2, False)
            return Loader(
                reader=Reader(),
                transform=prepare.cpu_transform,
                batch_size=batch_size,
                config=plan,
                size=(3, 32, 32),
                split_transform=split_transform,
            )

        self.loader, self.cpu_loader = loader(processes, prepare), loader(min(processes, 1))
        self.gpu_loader = GpuDecodingLoader(
            loader=self.loader,
            cpu_loader=self.cpu_loader,
            decode=decode,
            geometry=prepare.cpu_transform.resize_crop,
            device=CPU,
            share_controller=GpuShareController(self.share, 4),
        )

    def batches(self, *shards: Shard) -> list[Batch]:
        try:
            return [batch for shard in shards for batch in self.gpu_loader.batches(ShardQueue.of([shard]))]
        finally:
            self.gpu_loader.close()
            self.loader.close()


def decode_on_cpu(data: bytes, preprocess: Preprocess = CENTER_CROP) -> torch.Tensor:
    """Decode and resize an image exactly, as the CPU does; torchvision in place of the device gives equal bits."""
    turn = preprocess.exif == "apply"
    return ImageTransform(DecodeSettings(), ResizeCrop(preprocess), gray=False, apply_exif=turn)(data).pixels


def check_batches(batches: Sequence[Batch], contents: Sequence[bytes], bad: Sequence[int] = ()) -> None:
    """Check that each image is in its place and differs from the CPU's by one level at most."""
    infos = [info for batch in batches for info in batch.image_infos]
    assert [row for row, info in enumerate(infos) if info.error is not None] == list(bad)
    assert all(batch.encoded is None for batch in batches)
    pixels = torch.cat([batch.pixels for batch in batches if batch.pixels is not None])
    good_files = [data for row, data in enumerate(contents) if row not in set(bad)]
    expected = torch.stack([decode_on_cpu(data) for data in good_files])
    assert pixels.shape == expected.shape
    assert (pixels.int() - expected.int()).abs().max() <= 1
    for info, data in zip((info for info in infos if info.error is None), good_files, strict=True):
        with Image.open(io.BytesIO(data)) as image:
            assert (info.width, info.height) == image.size


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_batches_are_complete_and_in_order(value: float, processes: int, tmp_path: Path) -> None:
    contents = [encode_jpeg(make_photograph(n, (90 + n, 70))) for n in range(18)]
    contents[3], contents[8], contents[9] = (
        UNSUITABLE_FILES["progressive"],
        UNSUITABLE_FILES["PNG"],
        UNSUITABLE_FILES["grey"],
    )
    decoding = DecodingSetup(decode_files, value, processes)
    batches = decoding.batches(write_shard(tmp_path, contents))
    assert [(batch.start, len(batch.image_infos)) for batch in batches] == [(0, 4), (4, 4), (8, 4), (12, 4), (16, 2)]
    check_batches(batches, contents)
    assert decoding.gpu_loader.decoded == {0.0: 0, 0.4: 7, 1.0: 15}[value] or processes == 2
    assert (decoding.gpu_loader.decoded > 0) == (value > 0)


def test_images_from_the_device_equal_torchvision(tmp_path: Path) -> None:
    contents = [encode_jpeg(make_photograph(n, (200 - n, 90 + n))) for n in range(8)]
    batches = DecodingSetup(decode_files, 1.0).batches(write_shard(tmp_path, contents))
    pixels = torch.cat([batch.pixels for batch in batches if batch.pixels is not None])
    assert torch.equal(pixels, torch.stack([decode_on_cpu(data) for data in contents]))
    assert all(any(span.stage == "device decode" and span.images == 4 for span in batch.timings) for batch in batches)
    assert all(batch.stage_seconds["device decode"] > 0 for batch in batches)


@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess(resize=(20, 30)),
        Preprocess(resize=40, crop=32, interpolation="bicubic"),
        Preprocess(resize=16, crop=32),
        Preprocess(resize=40, crop=32, interpolation="nearest"),
        Preprocess(crop=(30, 60)),
        Preprocess(crop=400),
    ],
    ids=["both sides", "bicubic", "padded", "nearest", "crop alone", "all padded"],
)
def test_geometry_on_the_device_equals_the_cpu(preprocess: Preprocess) -> None:
    contents = [encode_jpeg(make_photograph(n, (120 + n, 80))) for n in range(3)]
    files = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in contents]
    pixels = ResizeCrop(preprocess).resize_on_device(decode_files(files))
    assert torch.equal(pixels, torch.stack([decode_on_cpu(data, preprocess) for data in contents]))


def decode_unless_refused(is_refused: Callable[[bytes], bool], files: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    if any(is_refused(bytes(file.tolist())) for file in files):
        raise RuntimeError("nvjpegDecodeBatched failed")
    return decode_files(files)


@pytest.mark.parametrize("processes", [0, 1])
def test_refused_files_are_decoded_on_the_cpu(processes: int, tmp_path: Path) -> None:
    contents = [encode_jpeg(make_photograph(n)) for n in range(10)]
    odd = {contents[1], contents[6], contents[7]}
    decoding = DecodingSetup(partial(decode_unless_refused, odd.__contains__), 1.0, processes)
    check_batches(decoding.batches(write_shard(tmp_path, contents)), contents)
    assert (decoding.gpu_loader.decoded, decoding.gpu_loader.refused) == (7, 3)


def test_refused_file_is_found_by_halving(tmp_path: Path) -> None:
    contents, sizes = [encode_jpeg(make_photograph(n)) for n in range(32)], list[int]()

    def counting_decode(files: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        sizes.append(len(files))
        return decode_unless_refused(contents[5].__eq__, files)

    check_batches(DecodingSetup(counting_decode, 1.0, batch_size=32).batches(write_shard(tmp_path, contents)), contents)
    assert len(sizes) == 11, "32, and two halves five times"


def test_error_rows_equal_those_of_the_cpu(tmp_path: Path) -> None:
    """Include a damaged file that looks complete, whose error the CPU's decoder must name."""
    torn = PLAIN_JPEG[:620] + b"\xff\xd9"
    contents = [PLAIN_JPEG, b"", torn, PLAIN_JPEG[:-40], b"text", PLAIN_JPEG]
    shard = write_shard(tmp_path, contents)
    (tmp_path / "001").unlink()
    batches = DecodingSetup(partial(decode_unless_refused, torn.__eq__), 1.0).batches(shard)
    (plain,) = DecodingSetup(decode_files, 0.0).batches(Shard(shard.key, shard.refs[:4], pa.table({})))
    assert [info.error for info in batches[0].image_infos] == [info.error for info in plain.image_infos]
    types = [info.error.type for batch in batches for info in batch.image_infos if info.error is not None]
    assert {"not_found", "truncated", "not_an_image"} <= set(types)
    assert all(batch.pixels is not None and len(batch.pixels) == count_good(batch) for batch in batches)


def count_good(batch: Batch) -> int:
    return sum(info.error is None for info in batch.image_infos)


def test_image_deleted_before_the_cpu_reads_it_is_an_error_row(tmp_path: Path) -> None:
    contents = [encode_jpeg(make_photograph(n)) for n in range(4)]
    shard = write_shard(tmp_path, contents)

    def is_deleted_and_refused(data: bytes) -> bool:
        if data == contents[2]:
            (tmp_path / "002").unlink(missing_ok=True)
        return data == contents[2]

    (batch,) = DecodingSetup(partial(decode_unless_refused, is_deleted_and_refused), 1.0).batches(shard)
    assert [info.error and info.error.type for info in batch.image_infos] == [None, None, "not_found", None]
    check_batches([batch], contents, bad=[2])


def test_decoder_that_refuses_everything_is_disabled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    contents = [encode_jpeg(make_photograph(n)) for n in range(40)]
    decoding = DecodingSetup(partial(decode_unless_refused, bool), 1.0)
    with caplog.at_level(logging.WARNING):
        check_batches(decoding.batches(write_shard(tmp_path, contents)), contents)
    assert "the CPU does it all now" in caplog.text
    assert decoding.share.value == 0.0
    assert decoding.gpu_loader.decoded == 0
    assert 8 <= decoding.gpu_loader.refused < 40


def test_decoded_pixels_on_the_device_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchjob.inference.gpu_decode._MAX_DECODED_PIXELS", 2 * 90 * 70)
    group_sizes: list[int] = []

    def counting_decode(files: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        group_sizes.append(len(files))
        return decode_files(files)

    contents = [encode_jpeg(make_photograph(n)) for n in range(3)] + [encode_jpeg(make_photograph(3, (300, 200)))]
    check_batches(DecodingSetup(counting_decode, 1.0).batches(write_shard(tmp_path, contents)), contents)
    assert group_sizes == [2, 1, 1]


def test_can_decode_respects_the_pixel_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchjob.inference.gpu_decode._MAX_DECODED_PIXELS", 2 * 90 * 70)
    group_sizes: list[int] = []

    def counting_decode(files: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        group_sizes.append(len(files))
        return decode_files(files)

    files = [torch.frombuffer(bytearray(encode_jpeg(make_photograph(n))), dtype=torch.uint8) for n in range(5)]
    assert DecodingSetup(counting_decode, 1.0).gpu_loader.can_decode(files, [90 * 70] * 5)
    assert group_sizes == [2, 2, 1]
    assert not DecodingSetup(partial(decode_unless_refused, bool), 1.0).gpu_loader.can_decode(files, [90 * 70] * 5)


def test_closed_loader_starts_no_processes(tmp_path: Path) -> None:
    started, release = threading.Event(), threading.Event()

    def slow(files: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        started.set()
        assert release.wait(60)
        raise RuntimeError("nvjpegDecodeBatched failed")

    decoding, ended = DecodingSetup(slow, 1.0, processes=1), list[BaseException]()

    def consume() -> None:
        try:
            list(decoding.gpu_loader.batches(ShardQueue.of([write_shard(tmp_path, [PLAIN_JPEG] * 4)])))
        except BatchjobError as error:
            ended.append(error)

    before = {*multiprocessing.active_children()}
    thread = threading.Thread(target=consume)
    thread.start()
    assert started.wait(60)
    decoding.gpu_loader.close()
    decoding.loader.close()
    release.set()
    thread.join(60)
    assert {*multiprocessing.active_children()} <= before
    assert [type(error) for error in ended] == [AttemptFailed]


def test_broken_device_fails_the_attempt(tmp_path: Path) -> None:
    def broken_decode(files: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        raise RuntimeError(CUDA_ASSERT)

    with pytest.raises(AttemptFailed, match="device-side assert"):
        DecodingSetup(broken_decode, 1.0).batches(write_shard(tmp_path, [PLAIN_JPEG] * 3))


def test_shard_for_the_cpu_is_not_decoded_on_the_device(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, [PLAIN_JPEG] * 6)
    decoding = DecodingSetup(decode_files, 1.0)
    check_batches(
        decoding.batches(Shard(shard.key, shard.refs, shard.passthrough, decode_on_cpu=True)), [PLAIN_JPEG] * 6
    )
    assert decoding.gpu_loader.decoded == 0


def test_unwanted_shard_is_not_decoded(tmp_path: Path) -> None:
    calls: list[int] = []

    def counting_decode(files: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        calls.append(len(files))
        for shard in queue.in_flight():
            queue.drop(shard)
        return decode_files(files)

    queue = ShardQueue.of([write_shard(tmp_path, [PLAIN_JPEG] * 40)])
    assert len(list(DecodingSetup(counting_decode, 1.0).gpu_loader.batches(queue))) <= 4
    assert 1 <= len(calls) <= 2


# -- jobs ------------------------------------------------------------------------------------------------------

NET = """\
from torch import nn


class Net(nn.Module):
    def forward(self, x):
        return x.mean(dim=(2, 3))


def make():
    return Net()


def prepare(image):
    return image
"""

JOB: dict[str, Any] = {
    "input": {"type": "prefix", "uri": "images/", "extensions": "all"},
    "model": {"type": "python", "target": "net:make"},
    "preprocess": {"resize": 40, "crop": 32, "mean": None, "std": None},
    "task": {"type": "embedding"},
    "decode": {"mode": "fast", "device": "cuda"},
    "runtime": {
        "pool": "local",
        "device": "cpu",
        "batch_size": 4,
        "shard_size": 10,
        "tuning": "off",
        "loader": {"processes": 1},
    },
    "errors": {"max_rate": 1},
    "output": {"uri": "out"},
}


def write_job(folder: Path, contents: Sequence[bytes] = (PLAIN_JPEG,), **sections: Any) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    for number, content in enumerate(contents):
        (folder / "images" / f"{number:03d}.jpg").write_bytes(content)
    (folder / "net.py").write_text(NET)
    (folder / "job.yaml").write_text(yaml.safe_dump({**JOB, **sections}))
    return folder / "job.yaml"


def expect_refusal(path: Path) -> str:
    with pytest.raises(InvalidJob) as ending:
        run(Job.from_file(path))
    assert ending.value.exit_code == 2
    assert not list(path.parent.glob("out/predictions/*"))
    return ending.value.message


@pytest.fixture
def replace_gpu_decoder(monkeypatch: pytest.MonkeyPatch) -> Callable[[JpegDecoder], None]:
    """Return a function that puts a decoder in place of the GPU's."""
    return lambda decode: monkeypatch.setattr("batchjob.worker.loader_setup.create_jpeg_decoder", lambda device: decode)


def embeddings(folder: Path) -> dict[str, list[float] | None]:
    rows = read_rows(folder / "out").to_pylist()
    assert [row["position"] for row in rows] == list(range(len(rows)))
    return {row["uri"].rpartition("/")[2]: row["embedding"] for row in rows}


def test_run_gives_the_rows_of_the_cpu(tmp_path: Path, replace_gpu_decoder: Callable[[JpegDecoder], None]) -> None:
    contents = [encode_jpeg(make_photograph(n, (90, 70 + n))) for n in range(25)]
    contents[4], contents[11], contents[12] = (
        UNSUITABLE_FILES["CMYK"],
        PLAIN_JPEG[:-40],
        UNSUITABLE_FILES["progressive"],
    )
    calls: list[int] = []

    def counting_decode(files: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        calls.append(len(files))
        return decode_files(files)

    replace_gpu_decoder(counting_decode)
    for name in ("there", "here"):
        (tmp_path / name).mkdir()
    on_device = run(Job.from_file(write_job(tmp_path / "there", contents)))
    on_cpu = run(Job.from_file(write_job(tmp_path / "here", contents, decode={"mode": "fast"})))
    assert (on_device.status, on_device.predicted, on_device.failed) == ("complete", 24, 1)
    assert (on_cpu.status, on_cpu.predicted, on_cpu.failed) == ("complete", 24, 1)
    assert 8 <= sum(calls) <= 16
    there, here = embeddings(tmp_path / "there"), embeddings(tmp_path / "here")
    assert [name for name, vector in there.items() if vector is None] == ["011.jpg"]
    for name, vector in there.items():
        assert vector == pytest.approx(here[name], abs=1 / 255)


def test_shard_is_decoded_on_the_cpu_after_a_crash(
    tmp_path: Path, replace_gpu_decoder: Callable[[JpegDecoder], None]
) -> None:
    def broken_decode(files: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        raise RuntimeError(CUDA_ASSERT)

    replace_gpu_decoder(broken_decode)
    path = write_job(tmp_path, [PLAIN_JPEG] * 10)
    with pytest.raises(BatchjobError) as ending:
        run(Job.from_file(path))
    assert (type(ending.value), ending.value.exit_code) == (DeviceFault, 75)
    outcome = run(Job.from_file(path))
    assert (outcome.status, outcome.predicted, outcome.failed) == ("complete", 10, 0)


def test_absent_cuda_is_reported_before_the_first_image(tmp_path: Path) -> None:
    assert (
        expect_refusal(write_job(tmp_path))
        == "decode.device: cuda, but the model runs on cpu; write decode.device: cpu"
    )


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"transform": "net:prepare"}, "preprocess.transform gets its images on the CPU"),
        ({**JOB["preprocess"], "channels": "gray"}, "preprocess.channels is gray"),
        ({**JOB["preprocess"], "crop": None}, "images come out in different sizes (preprocess.resize and crop)"),
        ({**JOB["preprocess"], "sizes": "group"}, "images come out in different sizes (preprocess.resize and crop)"),
    ],
    ids=["transform", "gray", "sizes", "group"],
)
def test_unsupported_preprocessing_is_refused(sections: dict[str, Any], why: str, tmp_path: Path) -> None:
    said = expect_refusal(write_job(tmp_path, preprocess=sections))
    assert said.startswith("decode.device: cuda makes batches of one size, in colour, but ")
    assert why in said


@pytest.mark.parametrize(
    ("decode", "said"),
    [
        ({"device": "cuda"}, "write mode: fast with it, or device: cpu"),
        ({"device": "cuda", "mode": "exact"}, "write mode: fast with it, or device: cpu"),
        ({"device": "cuda", "mode": "fast", "formats": ["png"]}, "but formats without jpeg"),
        ({"device": "gpu", "mode": "fast"}, "must be 'cpu' or 'cuda', not 'gpu'"),
    ],
)
def test_contradictory_decode_settings_are_refused(decode: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidJob) as raised:
        Job.from_file(write_job(tmp_path, decode=decode))
    assert said in raised.value.message
    assert "job.yaml:" in raised.value.message


def test_decode_device_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    there = Job.from_file(write_job(tmp_path))
    here = Job.from_file(write_job(tmp_path, decode={"mode": "fast"}))
    assert there.fingerprint()["decode"] == {"mode": "fast", "device": "cuda"}
    assert there.fingerprint() != here.fingerprint()


def test_decoder_requires_cuda() -> None:
    with pytest.raises(InvalidJob, match=r"decode\.device: cuda, but the model runs on cpu"):
        create_jpeg_decoder(CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_nvjpeg_is_near_the_cpu_decoder() -> None:
    decode = create_jpeg_decoder(torch.device("cuda"))
    contents = [encode_jpeg(make_photograph(n, (300, 200 + n)), quality=90) for n in range(16)]
    files = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in contents]
    pixels = ResizeCrop(CENTER_CROP).resize_on_device(decode(files)).cpu()
    assert (pixels.int() - torch.stack([decode_on_cpu(data) for data in contents]).int()).abs().max() <= 8
