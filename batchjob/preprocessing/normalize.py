"""Decoded pixels to what the model gets: geometry on the host on uint8, float and normalisation on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchjob.preprocessing.settings import Preprocess

if TYPE_CHECKING:
    import torch

__all__ = ["Normalizer"]


class Normalizer:
    """uint8 batch on the device to the model's float input: channel order, scale, mean and deviation.

    The operations are those of torchvision's presets, in their order, so the result is theirs.
    """

    def __init__(self, preprocess: Preprocess) -> None:
        self._preprocess = preprocess
        self._moments: dict[tuple[torch.device, torch.Size | None], tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Normalise `[n, c, h, w]`; computed in float32, given in `dtype`. A user transform's output stays as it is."""
        import torch

        if self._preprocess.transform is not None:
            return pixels.to(dtype) if pixels.is_floating_point() else pixels
        if self._preprocess.channels == "bgr":
            pixels = pixels.flip(1)
        values = pixels.to(torch.float32, copy=True)
        if self._preprocess.scale == "unit":
            values = values.div_(255)
        if self._preprocess.mean is not None:
            mean, std = self._beside(values)
            values = values.sub_(mean).div_(std)
        return values.to(dtype)

    def _beside(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation, one a channel; one a value where a CPU would take three values of a pixel at a time."""
        import torch

        spread = values.device.type == "cpu" and not values.is_contiguous()
        key = values.device, values.shape[1:] if spread else None
        found = self._moments.get(key)
        if found is None:
            with torch.inference_mode(mode=False):  # made under inference mode they would taint other modes
                mean, std = (
                    torch.tensor(moment, dtype=torch.float32, device=values.device).view(-1, 1, 1)
                    for moment in (self._preprocess.mean, self._preprocess.std)
                )
                if spread:
                    mean, std = (_like(values, moment) for moment in (mean, std))
            self._moments = {key: (mean, std)}  # of the last size alone: there may be any number
            found = mean, std
        return found


def _like(values: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """A channel's number for each value of an image, `[1, c, h, w]`, in the layout of `values` (channels last)."""
    import torch

    return moment.expand(1, *values.shape[1:]).contiguous(memory_format=torch.channels_last)
