"""A batch's pixels in one tensor, in shared memory where they travel from a loader process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from batchjob.errors import AttemptFailed
from batchjob.types import EncodedImages, ErrorRecord

if TYPE_CHECKING:
    import torch

__all__ = ["GpuSplitBatch", "RaggedBatch", "StackedBatch"]


class StackedBatch:
    """The batch's tensor, made for the first good image and filled in place.

    Args:
        rows: that it may come to have.
        size: the last dimensions every image must have; None takes those of the first.
        shared: whether it must travel to another process.
    """

    def __init__(self, rows: int, size: tuple[int, ...] | None, shared: bool) -> None:
        self._rows, self._size, self._shared = rows, size, shared
        self._tensor: torch.Tensor | None = None
        self._used = 0

    def add(self, image: torch.Tensor) -> ErrorRecord | None:
        """Put one image behind the others, or say why it does not go with them."""
        shape = tuple(image.shape)
        size = self._size or (shape if self._tensor is None else tuple(self._tensor.shape[1:]))
        if shape[-len(size) :] != size or (self._tensor is not None and shape != self._tensor.shape[1:]):
            message = f"comes out as {_shape(shape)}, the others as {_shape(size)}: give resize and crop in preprocess"
            return ErrorRecord("transform", "size", message)
        if self._tensor is None:
            self._tensor = _room_for(self._rows, image, self._shared)
        if image.dtype != self._tensor.dtype:
            return ErrorRecord("transform", "type", f"comes out as {image.dtype}, the others as {self._tensor.dtype}")
        self._tensor[self._used] = image
        self._used += 1
        return None

    def to_tensor(self) -> torch.Tensor | None:
        """`[n, c, h, w]` of the images that were added; None of none."""
        return None if self._tensor is None else self._tensor[: self._used]

    def shapes(self) -> None:
        """All alike."""

    def encoded(self) -> EncodedImages | None:
        """The images that a device is to decode."""
        return None


class GpuSplitBatch(StackedBatch):
    """Prepared images and, flat among them, such as a device is still to decode."""

    def __init__(self, rows: int, size: tuple[int, ...] | None, shared: bool) -> None:
        super().__init__(rows, size, shared)
        self._files: dict[int, torch.Tensor] = {}  # by place among the good images

    def add(self, image: torch.Tensor) -> ErrorRecord | None:
        """Put one image behind the others, or say why it does not go with them."""
        if image.ndim != 1:
            return super().add(image)
        self._files[self._used + len(self._files)] = image
        return None

    def encoded(self) -> EncodedImages | None:
        """The images that a device is to decode."""
        import torch

        if not self._files:
            return None
        ends = tuple(accumulate(file.numel() for file in self._files.values()))
        room = _room((ends[-1],), torch.uint8, self._shared)
        return EncodedImages(tuple(self._files), torch.cat(list(self._files.values()), out=room), ends)


class RaggedBatch:
    """Images of different sizes, one behind the other in one flat tensor."""

    def __init__(self, shared: bool) -> None:
        self._images: list[torch.Tensor] = []
        self._shared = shared

    def add(self, image: torch.Tensor) -> ErrorRecord | None:
        """Put one image behind the others, or say why it does not go with them."""
        if self._images and image.dtype != self._images[0].dtype:
            return ErrorRecord(
                "transform", "type", f"comes out as {image.dtype}, the others as {self._images[0].dtype}"
            )
        if image.ndim != 3:
            return ErrorRecord(
                "transform", "size", f"comes out as {_shape(image.shape)}, not as channels x height x width"
            )
        self._images.append(image)
        return None

    def to_tensor(self) -> torch.Tensor | None:
        """All values, image after image; None of none."""
        import torch

        if not self._images:
            return None
        room = _room((sum(image.numel() for image in self._images),), self._images[0].dtype, self._shared)
        return torch.cat([image.reshape(-1) for image in self._images], out=room)

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """`[c, h, w]` of each."""
        return tuple(tuple(image.shape) for image in self._images)

    def encoded(self) -> None:
        """None of them."""


def _room_for(rows: int, image: torch.Tensor, shared: bool) -> torch.Tensor:
    """Room for so many images in the layout of this one: no value is moved on the way that stands well."""
    if image.ndim != 3 or image.shape[0] == 1 or image.stride(0) != 1:
        return _room((rows, *image.shape), image.dtype, shared)
    channels, height, width = image.shape
    return _room((rows, height, width, channels), image.dtype, shared).permute(0, 3, 1, 2)


def _room(shape: tuple[int, ...], dtype: torch.dtype, shared: bool) -> torch.Tensor:
    """Raises AttemptFailed where there is no shared memory: no image is at fault."""
    import torch

    if not shared:
        return torch.empty(shape, dtype=dtype)
    # Not `share_memory_`: it copies what was not even written yet.
    try:
        storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    except RuntimeError as error:
        raise AttemptFailed(
            "there is no room for a batch in shared memory: enlarge /dev/shm (docker run --shm-size), or lower "
            f"runtime.batch_size or runtime.loader.prefetch ({error})"
        ) from error
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
