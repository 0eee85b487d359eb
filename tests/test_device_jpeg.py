"""JPEG files that a device decodes: the same rows as ever, in their order, and what becomes of those it refuses.

The device's decoder is torchvision's for the CPU here, but for one test that runs where there is a GPU.
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


def written(folder: Path, contents: Sequence[bytes]) -> Shard:
    for number, content in enumerate(contents):
        (folder / f"{number:03d}").write_bytes(content)
    refs = tuple(ImageRef(n, f"{n:03d}", str(folder / f"{n:03d}")) for n in range(len(contents)))
    return Shard(ShardKey(0, "0" * 16, len(refs), 0, 0), refs, pa.table({}))


class Decoding:
    """A loader and its decoding on the "device", by the decoder that is given."""

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

        def loader(processes: int, more: GpuSplitTransform | None = None) -> Loader:
            plan = LoaderConfig(processes, 2, False)
            return Loader(
                reader=Reader(),
                transform=prepare.cpu_transform,
                batch_size=batch_size,
                config=plan,
                size=(3, 32, 32),
                split_transform=more,
            )

        self.loader, self.host = loader(processes, prepare), loader(min(processes, 1))
        self.whole = GpuDecodingLoader(
            loader=self.loader,
            cpu_loader=self.host,
            decode=decode,
            geometry=prepare.cpu_transform.resize_crop,
            device=CPU,
            share_controller=GpuShareController(self.share, 4),
        )

    def batches(self, *shards: Shard) -> list[Batch]:
        try:
            return [batch for shard in shards for batch in self.whole.batches(ShardQueue.of([shard]))]
        finally:
            self.whole.close()
            self.loader.close()


def exact(data: bytes, preprocess: Preprocess = CENTER_CROP) -> torch.Tensor:
    """What the CPU makes of it, to the bit; torchvision's decoder and resize do the same in the device's place."""
    turn = preprocess.exif == "apply"
    return ImageTransform(DecodeSettings(), ResizeCrop(preprocess), gray=False, apply_exif=turn)(data).pixels


def check(batches: Sequence[Batch], contents: Sequence[bytes], bad: Sequence[int] = ()) -> None:
    """Each image in its place, as the CPU makes it but for a level."""
    facts = [fact for batch in batches for fact in batch.image_infos]
    assert [row for row, fact in enumerate(facts) if fact.error is not None] == list(bad)
    assert all(batch.encoded is None for batch in batches)
    pixels = torch.cat([batch.pixels for batch in batches if batch.pixels is not None])
    good = [data for row, data in enumerate(contents) if row not in set(bad)]
    wanted = torch.stack([exact(data) for data in good])
    assert pixels.shape == wanted.shape
    assert (pixels.int() - wanted.int()).abs().max() <= 1
    for fact, data in zip((fact for fact in facts if fact.error is None), good, strict=True):
        with Image.open(io.BytesIO(data)) as image:
            assert (fact.width, fact.height) == image.size


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_batches_come_whole_and_in_order(value: float, processes: int, tmp_path: Path) -> None:
    contents = [encode_jpeg(make_photograph(n, (90 + n, 70))) for n in range(18)]
    contents[3], contents[8], contents[9] = (
        UNSUITABLE_FILES["progressive"],
        UNSUITABLE_FILES["PNG"],
        UNSUITABLE_FILES["grey"],
    )
    decoding = Decoding(decode_files, value, processes)
    found = decoding.batches(written(tmp_path, contents))
    assert [(batch.start, len(batch.image_infos)) for batch in found] == [(0, 4), (4, 4), (8, 4), (12, 4), (16, 2)]
    check(found, contents)
    assert decoding.whole.decoded == {0.0: 0, 0.4: 7, 1.0: 15}[value] or processes == 2
    assert (decoding.whole.decoded > 0) == (value > 0)


def test_what_the_device_decodes_is_resized_as_torchvision_does(tmp_path: Path) -> None:
    contents = [encode_jpeg(make_photograph(n, (200 - n, 90 + n))) for n in range(8)]
    found = Decoding(decode_files, 1.0).batches(written(tmp_path, contents))
    pixels = torch.cat([batch.pixels for batch in found if batch.pixels is not None])
    assert torch.equal(pixels, torch.stack([exact(data) for data in contents]))
    assert all(any(span.stage == "device decode" and span.images == 4 for span in batch.timings) for batch in found)
    assert all(batch.stage_seconds["device decode"] > 0 for batch in found)


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
def test_the_geometry_on_a_device_is_the_exact_one(preprocess: Preprocess) -> None:
    contents = [encode_jpeg(make_photograph(n, (120 + n, 80))) for n in range(3)]
    files = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in contents]
    made = ResizeCrop(preprocess).resize_on_device(decode_files(files))
    assert torch.equal(made, torch.stack([exact(data, preprocess) for data in contents]))


def choosy(refused: Callable[[bytes], bool], files: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    if any(refused(bytes(file.tolist())) for file in files):
        raise RuntimeError("nvjpegDecodeBatched failed")
    return decode_files(files)


@pytest.mark.parametrize("processes", [0, 1])
def test_what_the_device_refuses_is_decoded_on_the_cpu(processes: int, tmp_path: Path) -> None:
    contents = [encode_jpeg(make_photograph(n)) for n in range(10)]
    odd = {contents[1], contents[6], contents[7]}
    decoding = Decoding(partial(choosy, odd.__contains__), 1.0, processes)
    check(decoding.batches(written(tmp_path, contents)), contents)
    assert (decoding.whole.decoded, decoding.whole.refused) == (7, 3)


def test_one_that_is_refused_is_found_in_halves(tmp_path: Path) -> None:
    contents, sizes = [encode_jpeg(make_photograph(n)) for n in range(32)], list[int]()

    def counted(files: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        sizes.append(len(files))
        return choosy(contents[5].__eq__, files)

    check(Decoding(counted, 1.0, batch_size=32).batches(written(tmp_path, contents)), contents)
    assert len(sizes) == 11, "32, and two halves five times"


def test_error_rows_are_as_ever(tmp_path: Path) -> None:
    """Among them a file that looks whole and is not, so that it is the CPU's decoder which names what ails it."""
    torn = PLAIN_JPEG[:620] + b"\xff\xd9"
    contents = [PLAIN_JPEG, b"", torn, PLAIN_JPEG[:-40], b"text", PLAIN_JPEG]
    shard = written(tmp_path, contents)
    (tmp_path / "001").unlink()
    found = Decoding(partial(choosy, torn.__eq__), 1.0).batches(shard)
    (plain,) = Decoding(decode_files, 0.0).batches(Shard(shard.key, shard.refs[:4], pa.table({})))
    assert [fact.error for fact in found[0].image_infos] == [fact.error for fact in plain.image_infos]
    types = [fact.error.type for batch in found for fact in batch.image_infos if fact.error is not None]
    assert {"not_found", "truncated", "not_an_image"} <= set(types)
    assert all(batch.pixels is not None and len(batch.pixels) == good(batch) for batch in found)


def good(batch: Batch) -> int:
    return sum(fact.error is None for fact in batch.image_infos)


def test_an_image_that_is_gone_when_the_cpu_s_turn_comes_is_an_error_row(tmp_path: Path) -> None:
    contents = [encode_jpeg(make_photograph(n)) for n in range(4)]
    shard = written(tmp_path, contents)

    def gone(data: bytes) -> bool:
        if data == contents[2]:
            (tmp_path / "002").unlink(missing_ok=True)
        return data == contents[2]

    (batch,) = Decoding(partial(choosy, gone), 1.0).batches(shard)
    assert [fact.error and fact.error.type for fact in batch.image_infos] == [None, None, "not_found", None]
    check([batch], contents, bad=[2])


def test_a_decoder_that_refuses_everything_is_asked_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    contents = [encode_jpeg(make_photograph(n)) for n in range(40)]
    decoding = Decoding(partial(choosy, bool), 1.0)
    with caplog.at_level(logging.WARNING):
        check(decoding.batches(written(tmp_path, contents)), contents)
    assert "the CPU does it all now" in caplog.text
    assert decoding.share.value == 0.0
    assert decoding.whole.decoded == 0
    assert 8 <= decoding.whole.refused < 40


def test_large_images_are_not_all_decoded_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchjob.inference.gpu_decode._MAX_DECODED_PIXELS", 2 * 90 * 70)
    seen: list[int] = []

    def counted(files: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        seen.append(len(files))
        return decode_files(files)

    contents = [encode_jpeg(make_photograph(n)) for n in range(3)] + [encode_jpeg(make_photograph(3, (300, 200)))]
    check(Decoding(counted, 1.0).batches(written(tmp_path, contents)), contents)
    assert seen == [2, 1, 1]


def test_a_look_at_the_device_holds_no_more_pixels_than_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchjob.inference.gpu_decode._MAX_DECODED_PIXELS", 2 * 90 * 70)
    seen: list[int] = []

    def counted(files: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        seen.append(len(files))
        return decode_files(files)

    files = [torch.frombuffer(bytearray(encode_jpeg(make_photograph(n))), dtype=torch.uint8) for n in range(5)]
    assert Decoding(counted, 1.0).whole.can_decode(files, [90 * 70] * 5)
    assert seen == [2, 2, 1]
    assert not Decoding(partial(choosy, bool), 1.0).whole.can_decode(files, [90 * 70] * 5)


def test_a_thread_that_outlives_it_starts_no_processes(tmp_path: Path) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def slow(files: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        asked.set()
        assert go_on.wait(60)
        raise RuntimeError("nvjpegDecodeBatched failed")

    decoding, ended = Decoding(slow, 1.0, processes=1), list[BaseException]()

    def ask() -> None:
        try:
            list(decoding.whole.batches(ShardQueue.of([written(tmp_path, [PLAIN_JPEG] * 4)])))
        except BatchjobError as error:
            ended.append(error)

    before = {*multiprocessing.active_children()}
    thread = threading.Thread(target=ask)
    thread.start()
    assert asked.wait(60)
    decoding.whole.close()
    decoding.loader.close()
    go_on.set()
    thread.join(60)
    assert {*multiprocessing.active_children()} <= before
    assert [type(error) for error in ended] == [AttemptFailed]


def test_a_device_that_breaks_fails_the_attempt_in_its_own_words(tmp_path: Path) -> None:
    def broken(files: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        raise RuntimeError(CUDA_ASSERT)

    with pytest.raises(AttemptFailed, match="device-side assert"):
        Decoding(broken, 1.0).batches(written(tmp_path, [PLAIN_JPEG] * 3))


def test_a_shard_that_is_the_cpu_s_is_left_to_it(tmp_path: Path) -> None:
    shard = written(tmp_path, [PLAIN_JPEG] * 6)
    decoding = Decoding(decode_files, 1.0)
    check(decoding.batches(Shard(shard.key, shard.refs, shard.passthrough, decode_on_cpu=True)), [PLAIN_JPEG] * 6)
    assert decoding.whole.decoded == 0


def test_a_shard_that_nobody_wants_any_more_is_not_decoded(tmp_path: Path) -> None:
    calls: list[int] = []

    def counted(files: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        calls.append(len(files))
        for shard in queue.in_flight():
            queue.drop(shard)
        return decode_files(files)

    queue = ShardQueue.of([written(tmp_path, [PLAIN_JPEG] * 40)])
    assert len(list(Decoding(counted, 1.0).whole.batches(queue))) <= 4
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


def refused(path: Path) -> str:
    with pytest.raises(InvalidJob) as ending:
        run(Job.from_file(path))
    assert ending.value.exit_code == 2
    assert not list(path.parent.glob("out/predictions/*"))
    return ending.value.message


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[[JpegDecoder], None]:
    """Puts a decoder in the place of the GPU's."""
    return lambda decode: monkeypatch.setattr("batchjob.worker.loader_setup.create_jpeg_decoder", lambda device: decode)


def embeddings(folder: Path) -> dict[str, list[float] | None]:
    rows = read_rows(folder / "out").to_pylist()
    assert [row["position"] for row in rows] == list(range(len(rows)))
    return {row["uri"].rpartition("/")[2]: row["embedding"] for row in rows}


def test_a_run_gives_the_rows_that_the_cpu_gives(tmp_path: Path, device: Callable[[JpegDecoder], None]) -> None:
    contents = [encode_jpeg(make_photograph(n, (90, 70 + n))) for n in range(25)]
    contents[4], contents[11], contents[12] = (
        UNSUITABLE_FILES["CMYK"],
        PLAIN_JPEG[:-40],
        UNSUITABLE_FILES["progressive"],
    )
    calls: list[int] = []

    def counted(files: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        calls.append(len(files))
        return decode_files(files)

    device(counted)
    for name in ("there", "here"):
        (tmp_path / name).mkdir()
    on_device = run(Job.from_file(write_job(tmp_path / "there", contents)))
    on_cpu = run(Job.from_file(write_job(tmp_path / "here", contents, decode={"mode": "fast"})))
    assert (on_device.status, on_device.predicted, on_device.failed) == ("complete", 24, 1)
    assert (on_cpu.status, on_cpu.predicted, on_cpu.failed) == ("complete", 24, 1)
    assert 8 <= sum(calls) <= 16
    there, here = embeddings(tmp_path / "there"), embeddings(tmp_path / "here")
    assert [name for name, found in there.items() if found is None] == ["011.jpg"]
    for name, found in there.items():
        assert found == pytest.approx(here[name], abs=1 / 255)


def test_after_a_crash_there_the_shard_is_decoded_on_the_cpu(
    tmp_path: Path, device: Callable[[JpegDecoder], None]
) -> None:
    def broken(files: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        raise RuntimeError(CUDA_ASSERT)

    device(broken)
    path = write_job(tmp_path, [PLAIN_JPEG] * 10)
    with pytest.raises(BatchjobError) as ending:
        run(Job.from_file(path))
    assert (type(ending.value), ending.value.exit_code) == (DeviceFault, 75)
    outcome = run(Job.from_file(path))
    assert (outcome.status, outcome.predicted, outcome.failed) == ("complete", 10, 0)


def test_cuda_that_is_not_there_is_said_before_an_image_is_read(tmp_path: Path) -> None:
    assert refused(write_job(tmp_path)) == "decode.device: cuda, but the model runs on cpu; write decode.device: cpu"


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
def test_what_a_device_cannot_prepare_is_refused(sections: dict[str, Any], why: str, tmp_path: Path) -> None:
    said = refused(write_job(tmp_path, preprocess=sections))
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
def test_settings_that_contradict_each_other_are_refused(decode: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidJob) as found:
        Job.from_file(write_job(tmp_path, decode=decode))
    assert said in found.value.message
    assert "job.yaml:" in found.value.message


def test_it_is_part_of_what_decides_the_predictions(tmp_path: Path) -> None:
    there = Job.from_file(write_job(tmp_path))
    here = Job.from_file(write_job(tmp_path, decode={"mode": "fast"}))
    assert there.fingerprint()["decode"] == {"mode": "fast", "device": "cuda"}
    assert there.fingerprint() != here.fingerprint()


def test_a_decoder_is_for_cuda_alone() -> None:
    with pytest.raises(InvalidJob, match=r"decode\.device: cuda, but the model runs on cpu"):
        create_jpeg_decoder(CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_the_gpu_s_own_decoder_is_near() -> None:
    decode = create_jpeg_decoder(torch.device("cuda"))
    contents = [encode_jpeg(make_photograph(n, (300, 200 + n)), quality=90) for n in range(16)]
    files = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in contents]
    made = ResizeCrop(CENTER_CROP).resize_on_device(decode(files)).cpu()
    assert (made.int() - torch.stack([exact(data) for data in contents]).int()).abs().max() <= 8
