"""Second half of the preprocessing, on the device: uint8 batch to float, channel order, scale, mean and std."""

from __future__ import annotations

import torch

from batchjob.preprocessing.settings import Preprocess

__all__ = ["Normalizer"]


class Normalizer:
    """Conversion of a uint8 batch on the device into the model's float input.

    The operations are those of torchvision's presets, in the same order, so the result has the same bits.

    Args:
        preprocess: Merged settings.
    """

    def __init__(self, preprocess: Preprocess) -> None:
        self._preprocess = preprocess
        # Only the last size is kept: with images of varying size there may be any number of them.
        self._mean_std: dict[tuple[torch.device, torch.Size | None], tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Normalise a batch.

        Args:
            pixels: Batch `[n, c, h, w]`: uint8, or the output of a user's transform, which is not normalised.
            dtype: Type of the result. The arithmetic is float32.

        Returns:
            Batch of the same shape.
        """
        if self._preprocess.transform is not None:
            return pixels.to(dtype) if pixels.is_floating_point() else pixels
        if self._preprocess.channels == "bgr":
            pixels = pixels.flip(1)
        values = pixels.to(torch.float32, copy=True)
        if self._preprocess.scale == "unit":
            values = values.div_(255)
        if self._preprocess.mean is not None:
            mean, std = self._get_mean_std(values)
            values = values.sub_(mean).div_(std)
        return values.to(dtype)

    def _get_mean_std(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and deviation in a shape that broadcasts to the batch, from the cache where they are there.

        The shape is `[c, 1, 1]`, or `[1, c, h, w]` where a broadcast along channels-last memory would make the CPU
        work on three values (one pixel) at a time.
        """
        per_value = values.device.type == "cpu" and not values.is_contiguous()
        key = values.device, values.shape[1:] if per_value else None
        cached = self._mean_std.get(key)
        if cached is None:
            # Tensors made under inference mode cannot be used outside of it later.
            with torch.inference_mode(mode=False):
                mean, std = (
                    torch.tensor(moment, dtype=torch.float32, device=values.device).view(-1, 1, 1)
                    for moment in (self._preprocess.mean, self._preprocess.std)
                )
                if per_value:
                    mean, std = (
                        moment.expand(1, *values.shape[1:]).contiguous(memory_format=torch.channels_last)
                        for moment in (mean, std)
                    )
            cached = mean, std
            self._mean_std = {key: cached}
        return cached
