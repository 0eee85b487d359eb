"""Which JPEG files are left to a device, how large a share of them, and what the bench makes of that."""

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
def test_plain_files_are_the_device_s(subsampling: str) -> None:
    assert read_baseline_jpeg_size(encode_jpeg(make_photograph(1), subsampling=subsampling)) == (70, 90)
    assert read_baseline_jpeg_size(encode_jpeg(make_photograph(1), subsampling=subsampling, restart_marker_rows=1)) == (
        70,
        90,
    )


@pytest.mark.parametrize("name", UNSUITABLE_FILES)
def test_all_others_are_the_cpu_s(name: str) -> None:
    assert read_baseline_jpeg_size(UNSUITABLE_FILES[name]) is None


def flat(prepare: GpuSplitTransform, data: bytes) -> bool:
    return prepare(data).pixels.ndim == 1


def test_a_file_is_left_as_it_is_with_its_size() -> None:
    made = make_split_transform(1.0)(PLAIN_JPEG)
    assert bytes(made.pixels.tolist()) == PLAIN_JPEG
    assert (made.width, made.height, made.axes_swapped) == (90, 70, False)


def test_what_is_too_large_or_would_be_is_the_cpu_s() -> None:
    assert flat(make_split_transform(1.0, max_pixels=6300), PLAIN_JPEG)
    assert flat(make_split_transform(1.0), encode_jpeg(make_photograph(1, (3000, 30))))
    with pytest.raises(ImageError, match="too narrow"):  # it would be 300 x 150,000
        make_split_transform(1.0, Preprocess(resize=300, crop=32))(encode_jpeg(make_photograph(1, (4000, 8))))


def test_turned_images_are_the_cpu_s_where_exif_counts() -> None:
    upright, turned = encode_jpeg(make_photograph(1)), encode_jpeg(make_photograph(1), orientation=6)
    assert flat(make_split_transform(1.0), turned)
    minding = make_split_transform(1.0, Preprocess(resize=40, crop=32, exif="apply"))
    assert flat(minding, upright)
    made = minding(turned)
    assert made.pixels.shape == (3, 32, 32)
    assert made.axes_swapped


# -- how many --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "wanted"), [(0.0, 0), (0.25, 5), (0.5, 10), (0.75, 15), (1.0, 20)])
def test_a_share_of_the_images_is_left(value: float, wanted: int) -> None:
    prepare = make_split_transform(value)
    assert sum(flat(prepare, PLAIN_JPEG) for _ in range(20)) == wanted


def test_what_cannot_be_left_is_made_up_for_but_not_for_long() -> None:
    prepare = make_split_transform(0.5)
    kinds = [PLAIN_JPEG, UNSUITABLE_FILES["progressive"]] * 8
    assert sum(flat(prepare, data) for data in kinds) == 7
    prepare = make_split_transform(0.5)
    for _ in range(20):
        prepare(UNSUITABLE_FILES["progressive"])
    assert [flat(prepare, PLAIN_JPEG) for _ in range(4)] == [True, True, True, False]


def test_a_share_that_is_changed_counts_at_once() -> None:
    prepare = make_split_transform(0.0)
    assert not flat(prepare, PLAIN_JPEG)
    prepare.share.value = 1.0
    assert flat(prepare, PLAIN_JPEG)


def test_the_share_grows_while_batches_are_waited_for_and_shrinks_while_they_wait() -> None:
    assert adjust_share(0.5, wait_fraction=0.4) > 0.5 > adjust_share(0.5, wait_fraction=0.0)
    assert adjust_share(0.5, wait_fraction=0.03) == 0.5
    assert adjust_share(1.0, wait_fraction=1.0) == 1.0
    assert adjust_share(0.0, wait_fraction=0.0) == 0.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def balanced(loading: float, working: float, window: int = 4, batches: int = 21) -> float:
    """The share after a run in which the loader takes so long over a batch, and whoever gets it, too."""
    clock, given = Clock(), make_share(0.5)

    def slow() -> Iterator[int]:
        for number in range(batches):
            clock.now += loading
            yield number

    for _ in GpuShareController(given, window, clock).observe(slow()):
        clock.now += working
    return given.value


def test_a_window_of_batches_moves_the_share_by_a_step() -> None:
    assert balanced(loading=1.0, working=1.0) == pytest.approx(0.75)
    assert balanced(loading=0.0, working=1.0) == pytest.approx(0.25)
    assert balanced(loading=0.03, working=0.97) == 0.5
    assert balanced(loading=1.0, working=1.0, batches=4) == 0.5
    assert balanced(loading=9.0, working=1.0, window=1, batches=99) == 1.0


def test_a_share_that_was_ended_stays_so() -> None:
    clock, given = Clock(), make_share(0.5)
    balance = GpuShareController(given, 1, clock)

    def slow() -> Iterator[int]:
        for number in range(9):
            clock.now += 1.0
            yield number

    batches = balance.observe(slow())
    next(batches)
    balance.disable()
    assert list(batches) == list(range(1, 9))
    assert given.value == 0.0


# -- the bench -------------------------------------------------------------------------------------------------


def ceiling(cores: int, device: float | None) -> float:
    """The CPU's, where decode and transform take 8 of 10 ms and the device decodes so many images a second."""
    spent = {"fetch": 1.0, "decode": 5.0, "transform": 3.0, "collate": 0.5, "forward": 0.5, "write": 0.0}
    stages = [StageMeasurement(name, 1e3, cpu_ms) for name, cpu_ms in spent.items()]
    found = compute_ceilings([*stages, *([] if device is None else [StageMeasurement("device decode", device)])], cores)
    return found[0].images_per_second


def test_the_ceiling_of_the_cpu_counts_what_the_device_decodes() -> None:
    assert ceiling(4, None) == pytest.approx(400)
    assert ceiling(4, 500) == pytest.approx(800)  # 300 decoded here: 4 s of CPU in all
    assert ceiling(4, 1e9) == pytest.approx(2000)  # all decoded there
    assert ceiling(4, 2000) == pytest.approx(2000)
