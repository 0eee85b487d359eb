"""Folders of so many images, made of the test data: few originals under many names. And weights that fit them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.workload import Workload, normalise

if TYPE_CHECKING:
    import torch

__all__ = ["IMAGE_SETS", "find_test_data", "make_images", "make_weights", "warm_page_cache"]

IMAGE_SETS = ("imagenet", "small", "large")
_LARGE = (4000, 3000)
_LARGE_ORIGINALS = 24
_CALIBRATION = 128  # images
_RIDGE = 0.01  # of the widest direction: what is narrower than its root is taken for noise
_SHARPNESS, _NEVER = 3.0, -1000.0  # deviation of the logits; logit of a class that no image stands for


def find_test_data() -> Path:
    """The test data: BATCHJOB_TEST_DATA, or `../shared/data`. Raises SystemExit where it is not there."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("BATCHJOB_TEST_DATA") or default)
    if not (folder / "imagenet-sample").is_dir():
        raise SystemExit(
            f"no images in {folder}: set BATCHJOB_TEST_DATA to a folder with imagenet-sample/ and cifar10/"
        )
    return folder


def make_images(work: Path, name: str, count: int) -> Path:
    """A flat folder of `count` JPEG files of the set `name`, as hard links to as many originals as there are.

    Args:
        work: where folders are made, and found again by the next run.
        name: `imagenet` (photographs of about 500x375), `small` (32x32) or `large` (the same photographs at 4000x3000).
        count: files.
    """
    folder = work / f"{name}-{count}"
    if folder.is_dir():
        return folder
    originals = list(_originals(work / f"{name}-originals", name))
    half_made = work / f"{name}-{count}.unfinished"
    half_made.mkdir(parents=True, exist_ok=True)
    for number, original in enumerate(islice(cycle(originals), count)):
        link = half_made / f"{number:07d}.jpg"
        link.unlink(missing_ok=True)
        link.hardlink_to(original)
    return half_made.rename(folder)


def make_weights(work: Path, model: str, images: Path, crop: int) -> Path:
    """State dict of a model with random weights from a fixed seed, whose labels mean something.

    Weights as they are drawn give nearly all images one label, by a hair that any rounding flips. So batch norms learn
    the images' statistics, and the last layer compares with some of them: label k is "most like image k", by the
    Mahalanobis product, in which no direction of the features outweighs all others.
    """
    import torch

    path = work / f"{model}-{images.name.split('-')[0]}-{crop}.pth"
    if path.exists():
        return path
    from benchmarks import architectures

    given = Workload(str(images), "", _CALIBRATION, 0, model, "", crop, os.devnull)
    torch.manual_seed(0)
    module = getattr(architectures, model)()
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # statistics are plain means
    pixels = torch.stack([normalise(_pixels(given, uri)) for uri in given.list_uris()])
    last = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)][-1]
    features: list[torch.Tensor] = []
    with torch.no_grad():
        module.train()(pixels)
        last.register_forward_pre_hook(lambda _, given: features.append(given[0]))
        module.eval()(pixels)
        centred = features[0] - features[0].mean(dim=0)
        spread = centred.T @ centred
        spread += _RIDGE * torch.linalg.matrix_norm(spread, 2) * torch.eye(len(spread))
        alike = torch.linalg.solve(spread, centred.T).T
        alike *= _SHARPNESS / (centred @ alike.T).std()
        last.weight.zero_()[: len(alike)] = alike
        last.bias.fill_(_NEVER)[: len(alike)] = -alike @ features[0].mean(dim=0)
    torch.save(module.state_dict(), path)
    return path


def warm_page_cache(folder: Path) -> int:
    """Read every file once, so that nobody pays for the disk alone; returns the bytes that are different."""
    seen: dict[int, int] = {}
    for path in folder.iterdir():
        inode = path.stat().st_ino
        if inode not in seen:
            seen[inode] = len(path.read_bytes())
    return sum(seen.values())


def _pixels(given: Workload, uri: str) -> torch.Tensor:
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    pixels: torch.Tensor = given.make_transform()(pil_to_tensor(Image.open(uri).convert("RGB")))
    return pixels


def _originals(folder: Path, name: str) -> Iterator[Path]:
    """Copies, on the same disk as the links."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, body in enumerate(_bodies(name)):
        path = folder / f"{number:04d}.jpg"
        if not path.exists():
            path.write_bytes(body)
        yield path


def _bodies(name: str) -> Iterable[bytes]:
    data = find_test_data()
    if name == "small":
        return (path.read_bytes() for path in sorted((data / "cifar10" / "images").rglob("*.jp*g")))
    photographs = sorted((data / "imagenet-sample").rglob("*.JPEG"))
    if name == "imagenet":
        return (path.read_bytes() for path in photographs)
    return (_enlarged(path) for path in photographs[:_LARGE_ORIGINALS])


def _enlarged(path: Path) -> bytes:
    from PIL import Image

    made = io.BytesIO()
    Image.open(path).convert("RGB").resize(_LARGE, Image.Resampling.BICUBIC).save(made, "JPEG", quality=90)
    return made.getvalue()
