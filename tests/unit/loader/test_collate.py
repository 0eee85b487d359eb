"""Batches in place: shapes, types, memory layout and shared memory."""

from __future__ import annotations

import pytest
import torch

from batchjob.errors import AttemptFailed
from batchjob.loader.collate import RaggedBatch, StackedBatch


def make_image(shade: int, *shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.full(shape or (3, 4, 5), shade, dtype=dtype)


# -- images of one size ----------------------------------------------------------------------------------------


def test_batch_holds_the_images_that_were_added_and_no_more() -> None:
    batch = StackedBatch(8, (4, 5), shared=False)
    assert [batch.add(make_image(shade)) for shade in (1, 2, 3)] == [None] * 3
    tensor = batch.to_tensor()
    assert tensor is not None
    assert tensor.shape == (3, 3, 4, 5)
    assert tensor[:, 0, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("batch", [StackedBatch(8, None, False), RaggedBatch(False)])
def test_batch_without_a_good_image_has_no_pixels(batch: StackedBatch | RaggedBatch) -> None:
    assert batch.to_tensor() is None


def test_refused_images_leave_no_gap() -> None:
    batch = StackedBatch(8, None, shared=False)
    batch.add(make_image(1))
    size_error = batch.add(make_image(2, 3, 4, 6))
    type_error = batch.add(make_image(3, dtype=torch.float32))
    batch.add(make_image(4))
    assert size_error is not None
    assert (size_error.stage, size_error.type) == ("transform", "size")
    assert size_error.message.startswith("comes out as 3x4x6, the others as 3x4x5")
    assert type_error is not None
    assert (type_error.type, type_error.message) == ("type", "comes out as torch.float32, the others as torch.uint8")
    tensor = batch.to_tensor()
    assert tensor is not None
    assert tensor[:, 0, 0, 0].tolist() == [1, 4]


@pytest.mark.parametrize(
    ("size", "first", "second"),
    [
        ((4, 5), (1, 4, 5), (3, 4, 5)),  # the first image decides the channels
        ((3, 4, 5), (3, 4, 5), (1, 4, 5)),
        (None, (1, 4, 5), (4, 5)),
    ],
)
def test_all_images_have_the_channels_of_the_first(
    size: tuple[int, ...] | None, first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    batch = StackedBatch(8, size, shared=False)
    assert batch.add(make_image(1, *first)) is None
    assert batch.add(make_image(2, *second)) is not None


def test_required_size_holds_for_the_first_image_too() -> None:
    batch = StackedBatch(8, (4, 5), shared=False)
    error = batch.add(make_image(1, 3, 9, 5))
    assert error is not None
    assert "comes out as 3x9x5, the others as 4x5" in error.message
    assert batch.add(make_image(2)) is None


@pytest.mark.parametrize("channels_last", [False, True])
def test_batch_has_the_memory_layout_of_its_first_image(channels_last: bool) -> None:
    # A decoder writes rows of pixels, [h, w, c], of which [c, h, w] is a view.
    decoded = torch.arange(60, dtype=torch.uint8).view(4, 5, 3).permute(2, 0, 1)
    image = decoded if channels_last else decoded.contiguous()
    batch = StackedBatch(2, (4, 5), shared=False)
    batch.add(image)
    batch.add(image)
    tensor = batch.to_tensor()
    assert tensor is not None
    assert tensor.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert tensor.is_contiguous() != channels_last
    assert torch.equal(tensor, torch.stack([decoded, decoded]))


# -- images of different sizes ---------------------------------------------------------------------------------


def test_ragged_images_follow_each_other_in_one_flat_tensor() -> None:
    batch = RaggedBatch(shared=False)
    images = [torch.arange(12, dtype=torch.uint8).view(3, 2, 2), make_image(9, 1, 1, 3), make_image(7, 3, 1, 1)]
    assert [batch.add(image) for image in images] == [None] * 3
    tensor = batch.to_tensor()
    assert tensor is not None
    assert tensor.tolist() == [*range(12), 9, 9, 9, 7, 7, 7]
    assert batch.shapes() == ((3, 2, 2), (1, 1, 3), (3, 1, 1))


def test_ragged_image_with_its_channels_last_is_written_channel_by_channel() -> None:
    decoded = torch.arange(6, dtype=torch.uint8).view(1, 2, 3)  # one row of two pixels, each with three channels
    batch = RaggedBatch(shared=False)
    batch.add(decoded.permute(2, 0, 1))
    tensor = batch.to_tensor()
    assert tensor is not None
    assert tensor.tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize(
    ("image", "kind", "message"),
    [
        (make_image(1, 3, 2, 2, dtype=torch.float32), "type", "comes out as torch.float32, the others as torch.uint8"),
        (make_image(1, 2, 2), "size", "comes out as 2x2, not as channels x height x width"),
    ],
)
def test_ragged_batch_refuses_other_types_and_dimensions(image: torch.Tensor, kind: str, message: str) -> None:
    batch = RaggedBatch(shared=False)
    batch.add(make_image(1, 3, 2, 2))
    error = batch.add(image)
    assert error is not None
    assert (error.stage, error.type, error.message) == ("transform", kind, message)
    assert batch.shapes() == ((3, 2, 2),)


# -- shared memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_batch_lies_in_shared_memory_if_it_travels(shared: bool) -> None:
    for batch in (StackedBatch(2, None, shared), RaggedBatch(shared)):
        batch.add(make_image(1))
        tensor = batch.to_tensor()
        assert tensor is not None
        assert tensor.is_shared() == shared


def test_full_shared_memory_fails_the_attempt_and_names_the_settings() -> None:
    batch = StackedBatch(1 << 45, None, shared=True)  # 2**45 images of 60 bytes are 2 PB
    with pytest.raises(AttemptFailed, match=r"no room for a batch in shared memory.*lower runtime\.batch_size"):
        batch.add(make_image(1))
