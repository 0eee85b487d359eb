"""Share of JPEG files that the GPU decodes: suitable files, control of the share, and the ceiling in the bench."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from jpeg_files import PLAIN_JPEG, UNSUITABLE_FILES, encode_jpeg, make_photograph, make_share, make_split_transform

from batchjob.bench.bottleneck import compute_ceilings
from batchjob.bench.results import StageMeasurement
from batchjob.errors import ImageError
from batchjob.loader.gpu_share import GpuShareController, GpuSplitTransform, adjust_share
from batchjob.preprocessing.jpeg import read_baseline_jpeg_size
from batchjob.preprocessing.settings import Preprocess

# -- which images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_baseline_jpeg_is_suitable_for_the_gpu(subsampling: str) -> None:
    assert read_baseline_jpeg_size(encode_jpeg(make_photograph(1), subsampling=subsampling)) == (70, 90)
    assert read_baseline_jpeg_size(encode_jpeg(make_photograph(1), subsampling=subsampling, restart_marker_rows=1)) == (
        70,
        90,
    )


@pytest.mark.parametrize("name", UNSUITABLE_FILES)
def test_other_files_are_decoded_on_the_cpu(name: str) -> None:
    assert read_baseline_jpeg_size(UNSUITABLE_FILES[name]) is None


def is_left_encoded(transform: GpuSplitTransform, data: bytes) -> bool:
    return transform(data).pixels.ndim == 1


def test_file_for_the_gpu_stays_encoded_with_its_size() -> None:
    prepared = make_split_transform(1.0)(PLAIN_JPEG)
    assert bytes(prepared.pixels.tolist()) == PLAIN_JPEG
    assert (prepared.width, prepared.height, prepared.axes_swapped) == (90, 70, False)


def test_too_large_images_are_decoded_on_the_cpu() -> None:
    assert is_left_encoded(make_split_transform(1.0, max_pixels=6300), PLAIN_JPEG)
    assert is_left_encoded(make_split_transform(1.0), encode_jpeg(make_photograph(1, (3000, 30))))
    with pytest.raises(ImageError, match="too narrow"):  # it would be 300 x 150,000
        make_split_transform(1.0, Preprocess(resize=300, crop=32))(encode_jpeg(make_photograph(1, (4000, 8))))


def test_rotated_images_are_decoded_on_the_cpu_if_exif_applies() -> None:
    upright, rotated = encode_jpeg(make_photograph(1)), encode_jpeg(make_photograph(1), orientation=6)
    assert is_left_encoded(make_split_transform(1.0), rotated)
    with_exif = make_split_transform(1.0, Preprocess(resize=40, crop=32, exif="apply"))
    assert is_left_encoded(with_exif, upright)
    prepared = with_exif(rotated)
    assert prepared.pixels.shape == (3, 32, 32)
    assert prepared.axes_swapped


# -- how many --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "expected"), [(0.0, 0), (0.25, 5), (0.5, 10), (0.75, 15), (1.0, 20)])
def test_share_of_images_stays_encoded(value: float, expected: int) -> None:
    transform = make_split_transform(value)
    assert sum(is_left_encoded(transform, PLAIN_JPEG) for _ in range(20)) == expected


def test_unsuitable_files_are_compensated_by_at_most_two_images() -> None:
    transform = make_split_transform(0.5)
    kinds = [PLAIN_JPEG, UNSUITABLE_FILES["progressive"]] * 8
    assert sum(is_left_encoded(transform, data) for data in kinds) == 7
    transform = make_split_transform(0.5)
    for _ in range(20):
        transform(UNSUITABLE_FILES["progressive"])
    assert [is_left_encoded(transform, PLAIN_JPEG) for _ in range(4)] == [True, True, True, False]


def test_changed_share_applies_to_the_next_image() -> None:
    transform = make_split_transform(0.0)
    assert not is_left_encoded(transform, PLAIN_JPEG)
    transform.share.value = 1.0
    assert is_left_encoded(transform, PLAIN_JPEG)


def test_share_grows_while_waiting_and_shrinks_otherwise() -> None:
    assert adjust_share(0.5, wait_fraction=0.4) > 0.5 > adjust_share(0.5, wait_fraction=0.0)
    assert adjust_share(0.5, wait_fraction=0.03) == 0.5
    assert adjust_share(1.0, wait_fraction=1.0) == 1.0
    assert adjust_share(0.0, wait_fraction=0.0) == 0.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def run_controller(loading: float, working: float, window: int = 4, batches: int = 21) -> float:
    """Return the share after a run in which loading and using a batch take these seconds."""
    clock, gpu_share = Clock(), make_share(0.5)

    def load_slowly() -> Iterator[int]:
        for number in range(batches):
            clock.now += loading
            yield number

    for _ in GpuShareController(gpu_share, window, clock).observe(load_slowly()):
        clock.now += working
    return gpu_share.value


def test_each_window_of_batches_moves_the_share_by_one_step() -> None:
    assert run_controller(loading=1.0, working=1.0) == pytest.approx(0.75)
    assert run_controller(loading=0.0, working=1.0) == pytest.approx(0.25)
    assert run_controller(loading=0.03, working=0.97) == 0.5
    assert run_controller(loading=1.0, working=1.0, batches=4) == 0.5
    assert run_controller(loading=9.0, working=1.0, window=1, batches=99) == 1.0


def test_disabled_share_stays_zero() -> None:
    clock, gpu_share = Clock(), make_share(0.5)
    controller = GpuShareController(gpu_share, 1, clock)

    def load_slowly() -> Iterator[int]:
        for number in range(9):
            clock.now += 1.0
            yield number

    batches = controller.observe(load_slowly())
    next(batches)
    controller.disable()
    assert list(batches) == list(range(1, 9))
    assert gpu_share.value == 0.0


# -- the bench -------------------------------------------------------------------------------------------------


def compute_cpu_ceiling(cores: int, device: float | None) -> float:
    """Return the ceiling of the CPU: decode and transform take 8 of 10 ms, the GPU decodes `device` images each s."""
    spent = {"fetch": 1.0, "decode": 5.0, "transform": 3.0, "collate": 0.5, "forward": 0.5, "write": 0.0}
    stages = [StageMeasurement(name, 1e3, cpu_ms) for name, cpu_ms in spent.items()]
    ceilings = compute_ceilings(
        [*stages, *([] if device is None else [StageMeasurement("device decode", device)])], cores
    )
    return ceilings[0].images_per_second


def test_cpu_ceiling_counts_images_decoded_on_the_gpu() -> None:
    assert compute_cpu_ceiling(4, None) == pytest.approx(400)
    assert compute_cpu_ceiling(4, 500) == pytest.approx(800)  # 300 decoded here: 4 s of CPU in all
    assert compute_cpu_ceiling(4, 1e9) == pytest.approx(2000)  # all decoded there
    assert compute_cpu_ceiling(4, 2000) == pytest.approx(2000)
