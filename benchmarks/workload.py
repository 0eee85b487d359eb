"""Work that every system is asked to do, as a command line; and the progress file by which its pace is measured.

torch is imported inside the functions: a system's own start-up is part of what is measured.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["MEAN", "STD", "Workload", "append_progress", "list_first_images", "normalize"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Workload:
    """One run of one system: plain data, since it travels to processes on command lines and by pickle.

    Attributes:
        images: Folder of the images, a path or an `s3://` URI.
        output: Folder for the Parquet files, a path or an `s3://` URI.
        limit: Number of images, the first ones by name.
        batch: Images in a batch.
        model: Function of `architectures.py`.
        weights: File of its state dict.
        crop: Side of the square that the model sees, out of a picture whose shorter side is 8/7 of it, like ImageNet's
            256 and 224; 0 takes pictures unchanged.
        marks: Progress file, see `append_progress`.
    """

    images: str
    output: str
    limit: int
    batch: int
    model: str
    weights: str
    crop: int
    marks: str

    @classmethod
    def parse(cls) -> Workload:
        """Parse the command line of this process."""
        parser = argparse.ArgumentParser()
        for name, kind, default in (
            ("images", str, None),
            ("output", str, None),
            ("limit", int, None),
            ("batch", int, 32),
            ("model", str, "mobilenet"),
            ("weights", str, None),
            ("crop", int, 224),
            ("marks", str, os.devnull),
        ):
            parser.add_argument(f"--{name}", type=kind, default=default, required=default is None)
        return cls(**vars(parser.parse_args()))

    @property
    def command_line(self) -> list[str]:
        """Arguments that `parse` reads."""
        return [word for name, value in vars(self).items() for word in (f"--{name}", str(value))]

    @property
    def resize(self) -> int:
        """Length of the shorter side before the crop, in pixels; 0 takes pictures unchanged."""
        return self.crop * 8 // 7

    def list_uris(self) -> list[str]:
        """List the images by name."""
        return list_first_images(self.images, self.limit)

    def load_model(self) -> nn.Module:
        """Load the model, ready to predict."""
        import torch

        from benchmarks import architectures

        module: nn.Module = getattr(architectures, self.model)()
        module.load_state_dict(torch.load(self.weights, weights_only=True))
        return module.eval()

    def make_transform(self) -> Any:
        """Make the resize and crop of torchvision's `weights.transforms()`: uint8 or float `[3, H, W]` to the crop."""
        from torchvision import transforms

        steps = [transforms.Resize(self.resize, antialias=True), transforms.CenterCrop(self.crop)] if self.crop else []
        return transforms.Compose(steps)

    def make_fast_transform(self) -> Any:
        """Make the same in uint8 with torchvision's v2: three times as fast on a CPU, off by 1 here and there."""
        from torchvision.transforms import v2

        return v2.Compose(
            [v2.Resize(self.resize, antialias=True), v2.CenterCrop(self.crop)] if self.crop else [v2.Identity()]
        )

    def log_progress(self, images: int) -> None:
        """Append to the progress file that so many more images are predicted."""
        append_progress(self.marks, images)


def list_first_images(folder: str, limit: int) -> list[str]:
    """List the URIs of a folder's first files by name."""
    if "://" not in folder:
        return sorted(str(path) for path in Path(folder).iterdir())[:limit]
    import fsspec

    filesystem, path = fsspec.url_to_fs(folder)
    return [filesystem.unstrip_protocol(name) for name in sorted(filesystem.ls(path, detail=False))[:limit]]


def append_progress(path: str, images: int) -> None:
    """Append one line, from any process of the machine: seconds on the monotonic clock, images."""
    with Path(path).open("ab", buffering=0) as file:  # one write of a few bytes, so lines never mix
        file.write(f"{time.monotonic():.6f} {images}\n".encode())


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Normalise uint8 `[..., 3, h, w]` to float with ImageNet's mean and deviation."""
    import torch

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std
