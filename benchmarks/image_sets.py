"""Folders of JPEG files made from the test data: few originals under many names; and weights that fit them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from benchmarks import architectures
from benchmarks.workload import Workload, normalize

__all__ = ["IMAGE_SETS", "find_test_data", "make_images", "make_weights", "warm_page_cache"]

IMAGE_SETS = ("imagenet", "small", "large")

_LARGE_SIZE = (4000, 3000)
_LARGE_ORIGINALS = 24
_CALIBRATION_IMAGES = 128
_RIDGE = 0.01  # part of the largest variance; directions with a smaller variance count as noise
_LOGIT_STD = 3.0
_UNUSED_LOGIT = -1000.0  # logit of a class that stands for no image


def find_test_data() -> Path:
    """Find the test data: BATCHJOB_TEST_DATA, or `../shared/data`. Raises SystemExit if it is not there."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("BATCHJOB_TEST_DATA") or default)
    if not (folder / "imagenet-sample").is_dir():
        raise SystemExit(
            f"no images in {folder}: set BATCHJOB_TEST_DATA to a folder with imagenet-sample/ and cifar10/"
        )
    return folder


def make_images(work: Path, name: str, count: int) -> Path:
    """Make a flat folder of JPEG files, as hard links to the originals of a set; reuse it if it is there.

    Args:
        work: Folder in which such folders are kept for the next run.
        name: Set: `imagenet` (photographs of about 500x375), `small` (32x32) or `large` (the same photographs at
            4000x3000).
        count: Number of files.
    """
    folder = work / f"{name}-{count}"
    if folder.is_dir():
        return folder
    originals = list(_copy_originals(work / f"{name}-originals", name))
    unfinished = work / f"{name}-{count}.unfinished"
    unfinished.mkdir(parents=True, exist_ok=True)
    for number, original in enumerate(islice(cycle(originals), count)):
        link = unfinished / f"{number:07d}.jpg"
        link.unlink(missing_ok=True)
        link.hardlink_to(original)
    return unfinished.rename(folder)


def make_weights(work: Path, model: str, images: Path, crop: int) -> Path:
    """Make a state dict with random weights from a fixed seed whose labels mean something; reuse it if it is there.

    Random weights alone give nearly all images one label, by a margin that any rounding flips. So batch norms learn
    the images' statistics, and the last layer compares with some images: label k means "most like image k", by the
    Mahalanobis product, in which no direction of the features outweighs all others.
    """
    path = work / f"{model}-{images.name.split('-')[0]}-{crop}.pth"
    if path.exists():
        return path
    workload = Workload(str(images), "", _CALIBRATION_IMAGES, 0, model, "", crop, os.devnull)
    torch.manual_seed(0)
    module = getattr(architectures, model)()
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # statistics are plain means
    pixels = torch.stack([normalize(_load_pixels(workload, uri)) for uri in workload.list_uris()])
    last_layer = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)][-1]
    features: list[torch.Tensor] = []
    with torch.no_grad():
        module.train()(pixels)
        last_layer.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        module.eval()(pixels)
        mean = features[0].mean(dim=0)
        centered = features[0] - mean
        covariance = centered.T @ centered
        covariance += _RIDGE * torch.linalg.matrix_norm(covariance, 2) * torch.eye(len(covariance))
        whitened = torch.linalg.solve(covariance, centered.T).T
        whitened *= _LOGIT_STD / (centered @ whitened.T).std()
        last_layer.weight.zero_()[: len(whitened)] = whitened
        last_layer.bias.fill_(_UNUSED_LOGIT)[: len(whitened)] = -whitened @ mean
    torch.save(module.state_dict(), path)
    return path


def warm_page_cache(folder: Path) -> int:
    """Read every file once, so that the first system does not pay for the disk alone; return the distinct bytes."""
    sizes: dict[int, int] = {}
    for path in folder.iterdir():
        inode = path.stat().st_ino
        if inode not in sizes:
            sizes[inode] = len(path.read_bytes())
    return sum(sizes.values())


def _load_pixels(workload: Workload, uri: str) -> torch.Tensor:
    pixels: torch.Tensor = workload.make_transform()(pil_to_tensor(Image.open(uri).convert("RGB")))
    return pixels


def _copy_originals(folder: Path, name: str) -> Iterator[Path]:
    """Copy the originals of a set to the disk that will hold the links."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(_read_originals(name)):
        path = folder / f"{number:04d}.jpg"
        if not path.exists():
            path.write_bytes(data)
        yield path


def _read_originals(name: str) -> Iterable[bytes]:
    folder = find_test_data()
    if name == "small":
        return (path.read_bytes() for path in sorted((folder / "cifar10" / "images").rglob("*.jp*g")))
    photographs = sorted((folder / "imagenet-sample").rglob("*.JPEG"))
    if name == "imagenet":
        return (path.read_bytes() for path in photographs)
    return (_enlarge(path) for path in photographs[:_LARGE_ORIGINALS])


def _enlarge(path: Path) -> bytes:
    output = io.BytesIO()
    image = Image.open(path).convert("RGB").resize(_LARGE_SIZE, Image.Resampling.BICUBIC)
    image.save(output, "JPEG", quality=90)
    return output.getvalue()
