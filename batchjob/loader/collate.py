"""Collation of prepared images into one batch tensor, in shared memory where it travels from a loader process."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from batchjob.errors import AttemptFailed
from batchjob.types import ErrorRecord

__all__ = ["RaggedBatch", "StackedBatch"]


class StackedBatch:
    """Batch of images of one size, allocated for the first good image and filled in place.

    Args:
        rows: Images that the batch may get.
        size: Last dimensions that every image must have; None takes those of the first image.
        shared: True if the batch travels to another process.
    """

    def __init__(self, rows: int, size: tuple[int, ...] | None, shared: bool) -> None:
        self._rows, self._size, self._shared = rows, size, shared
        self._tensor: torch.Tensor | None = None
        self._used = 0

    def add(self, image: torch.Tensor) -> ErrorRecord | None:
        """Append an image; return an error if it does not fit to the others."""
        shape = tuple(image.shape)
        size = self._size or (shape if self._tensor is None else tuple(self._tensor.shape[1:]))
        if shape[-len(size) :] != size or (self._tensor is not None and shape != self._tensor.shape[1:]):
            message = (
                f"comes out as {_format_shape(shape)}, the others as {_format_shape(size)}: "
                "give resize and crop in preprocess"
            )
            return ErrorRecord("transform", "size", message)
        if self._tensor is None:
            self._tensor = _allocate_batch(self._rows, image, self._shared)
        if image.dtype != self._tensor.dtype:
            return ErrorRecord("transform", "type", f"comes out as {image.dtype}, the others as {self._tensor.dtype}")
        self._tensor[self._used] = image
        self._used += 1
        return None

    def to_tensor(self) -> torch.Tensor | None:
        """Return the images that were added, `[n, c, h, w]`; None if there are none."""
        return None if self._tensor is None else self._tensor[: self._used]

    def shapes(self) -> None:
        """Return None: all images have the same shape."""


class RaggedBatch:
    """Batch of images of different sizes, their values one after another in one flat tensor.

    Args:
        shared: True if the batch travels to another process.
    """

    def __init__(self, shared: bool) -> None:
        self._images: list[torch.Tensor] = []
        self._shared = shared

    def add(self, image: torch.Tensor) -> ErrorRecord | None:
        """Append an image; return an error if it does not fit to the others."""
        if self._images and image.dtype != self._images[0].dtype:
            message = f"comes out as {image.dtype}, the others as {self._images[0].dtype}"
            return ErrorRecord("transform", "type", message)
        if image.ndim != 3:
            message = f"comes out as {_format_shape(image.shape)}, not as channels x height x width"
            return ErrorRecord("transform", "size", message)
        self._images.append(image)
        return None

    def to_tensor(self) -> torch.Tensor | None:
        """Return all values, image after image, as a flat tensor; None if there are no images."""
        if not self._images:
            return None
        values = sum(image.numel() for image in self._images)
        tensor = _allocate((values,), self._images[0].dtype, self._shared)
        return torch.cat([image.reshape(-1) for image in self._images], out=tensor)

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Return `[c, h, w]` of each image."""
        return tuple(tuple(image.shape) for image in self._images)


def _allocate_batch(rows: int, image: torch.Tensor, shared: bool) -> torch.Tensor:
    """Allocate a batch in the memory layout of its first image, so that images are copied without a transposition.

    Example: a decoded image `[3, 224, 224]` has its channels last in memory (stride 1 in the first dimension); so the
    batch is allocated as `[rows, 224, 224, 3]` and viewed as `[rows, 3, 224, 224]`.
    """
    if image.ndim != 3 or image.shape[0] == 1 or image.stride(0) != 1:
        return _allocate((rows, *image.shape), image.dtype, shared)
    channels, height, width = image.shape
    return _allocate((rows, height, width, channels), image.dtype, shared).permute(0, 3, 1, 2)


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, shared: bool) -> torch.Tensor:
    """Allocate a tensor, in shared memory if asked for.

    Raises:
        AttemptFailed: Shared memory is full, which is not the fault of any image.
    """
    if not shared:
        return torch.empty(shape, dtype=dtype)
    # `share_memory_` would copy a tensor whose values are not even written yet.
    try:
        storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    except RuntimeError as error:
        raise AttemptFailed(
            "there is no room for a batch in shared memory: enlarge /dev/shm (docker run --shm-size), or lower "
            f"runtime.batch_size or runtime.loader.prefetch ({error})"
        ) from error
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


def _format_shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
