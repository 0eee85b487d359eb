"""Images to try a model on: the job's own first images, one example image, and random pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from batchjob.errors import InvalidJob
from batchjob.job.job import Job
from batchjob.loader.sample import load_samples
from batchjob.loader.settings import resolve_loader_settings
from batchjob.preprocessing.transforms import ImageTransform
from batchjob.storage.reader import Reader
from batchjob.system import available_memory
from batchjob.text import format_count
from batchjob.types import ErrorRecord

__all__ = [
    "TransformFailed",
    "check_images",
    "contrasting_images",
    "load_images",
    "make_example_image",
    "random_pixels",
    "repeat_image",
    "trim_output",
]

# Side of the example image, in pixels, if neither a setting nor an image tells the size.
_DEFAULT_SIDE = 224


# Images that `validate` tries, so that transforms that fail, or give several sizes, are found.
_TRIED_IMAGES = 16


class TransformFailed(InvalidJob):
    """The job's own transform fails on every image that decodes."""


def load_images(
    job: Job, reader: Reader, transform: ImageTransform, locations: Iterable[str]
) -> Iterator[torch.Tensor]:
    """Yield prepared images `[c, h, w]` of these locations; those that cannot be read or decoded are left out.

    They are decoded in a process of their own: an image that crashes its decoder does not end this one.

    Raises:
        Unavailable: The store cannot be reached.
        AttemptFailed: The process dies, and no image caused it.
    """
    samples = _load_samples(job, reader, transform, locations)
    return (sample for sample in samples if isinstance(sample, torch.Tensor))


def check_images(
    job: Job, reader: Reader, transform: ImageTransform, locations: Sequence[str], variable_size: bool
) -> list[str]:
    """Try the preprocessing on the first images: find transforms that fail, and images that come out in other sizes.

    Args:
        job: Job, whose error budget says if that ends the job.
        reader: Reader of the locations.
        transform: Preprocessing of one image.
        locations: Locations of images, of which the first are tried.
        variable_size: True if the model takes images of different sizes.

    Returns:
        Lines for a person about what fails within the budget; none if nothing does.

    Raises:
        InvalidJob: More images fail than `errors.max_rate` allows.
    """
    tried, sizes = locations[:_TRIED_IMAGES], list[tuple[str, tuple[int, ...]]]()
    failures: list[str] = []
    samples = _load_samples(job, reader, transform, tried)
    for location, sample in zip(tried, samples, strict=True):
        if isinstance(sample, torch.Tensor):
            sizes.append((location, tuple(sample.shape)))
        elif sample.stage == "transform":
            failures.append(f"{location}: {sample.message}")
    first_size = sizes[0][1] if sizes else ()
    others = [(location, size) for location, size in sizes if size != first_size]
    if others and not variable_size:
        location, size = others[0]
        text = (
            f"{location} comes out as {_format_size(size)}, {sizes[0][0]} as {_format_size(first_size)}, and images of "
            "another size than the first become error rows; bring them to one size, as by preprocess.resize: "
            "[height, width] or a crop, or write preprocess.sizes: group"
        )
        failures += [text] * len(others)
    if not failures:
        return []
    text = f"{len(failures)} of the first {format_count(len(tried), 'image')} cannot be prepared: {failures[0]}"
    if len(failures) > job.errors.max_rate * len(tried):
        raise InvalidJob(f"preprocess: {text}")
    return [text]


def make_example_image(job: Job, reader: Reader, transform: ImageTransform, locations: Sequence[str]) -> torch.Tensor:
    """Return one prepared image `[c, h, w]`: random pixels if the settings fix the size, else the first that decodes.

    Raises:
        TransformFailed: The job's own transform fails on every image that decodes.
        InvalidJob: None of the locations holds an image that decodes, so the model's input size is not known.
    """
    size = transform.resize_crop.size
    if size is None and locations:
        return _first_decodable(job, reader, transform, locations)
    return random_pixels((1 if transform.gray else 3, *(size or (_DEFAULT_SIDE, _DEFAULT_SIDE))), 1)[0]


def contrasting_images(size: Sequence[int], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Return a black image, a white one and random pixels, each `[c, h, w]`, to see how far a model's output varies.

    Args:
        size: See `random_pixels`.
        dtype: See `random_pixels`.
    """
    noise = random_pixels(size, 1, dtype)[0]
    white = 1.0 if noise.is_floating_point() else 255
    return [torch.zeros_like(noise), torch.full_like(noise, white), noise]


def random_pixels(size: Sequence[int], rows: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return random pixels `[rows, c, h, w]`, the same ones in each call; the global generator is not used.

    Args:
        size: `(h, w)` for three channels, or `(c, h, w)`.
        rows: Number of images.
        dtype: None and uint8 draw from 0 to 255; a floating point dtype draws from 0 to 1.
    """
    shape = (rows, *((3,) if len(size) == 2 else ()), *size)
    generator = torch.Generator().manual_seed(0)
    if dtype is None or dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return torch.rand(shape, dtype=dtype, generator=generator)


def repeat_image(image: torch.Tensor, rows: int) -> torch.Tensor:
    """Return a batch `[rows, c, h, w]` of one image."""
    return image.expand(rows, *image.shape).contiguous()


def trim_output(output: Any, rows: int, wanted_rows: int) -> Any:
    """Turn a model's output for `rows` copies of one image into its output for `wanted_rows` copies.

    A model with a fixed batch size runs on that many copies of the example, while tasks look at `wanted_rows`. Only
    tensors whose first dimension is `rows` are trimmed. Example: `{"logits": [8, 10], "scale": []}` with `rows=8` and
    `wanted_rows=2` becomes `{"logits": [2, 10], "scale": []}`.
    """

    def trim(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0 or len(leaf) != rows:
            return leaf
        return leaf[:1].expand(wanted_rows, *leaf.shape[1:])

    return tree_map(trim, output)


def _load_samples(
    job: Job, reader: Reader, transform: ImageTransform, locations: Iterable[str]
) -> Iterator[torch.Tensor | ErrorRecord]:
    config = resolve_loader_settings(
        job.runtime.loader, cores=1, memory_bytes=available_memory(), max_pixels=job.decode.max_pixels
    )
    return load_samples(reader, transform, locations, config, job.decode.max_bytes)


def _first_decodable(job: Job, reader: Reader, transform: ImageTransform, locations: Sequence[str]) -> torch.Tensor:
    errors: list[ErrorRecord] = []
    for sample in _load_samples(job, reader, transform, locations):
        if isinstance(sample, torch.Tensor):
            return sample
        errors.append(sample)
    count = f"the first {format_count(len(locations), 'image')}"
    faults = [error for error in errors if error.stage == "transform"]
    user_transform = transform.resize_crop.user_transform
    if faults and user_transform is not None:
        raise TransformFailed(
            f"preprocess.transform fails on each of {count} that decodes: {faults[0].message}; correct it; it is "
            f"given {user_transform.input_words} (preprocess.transform_input)"
        )
    reason = f" ({errors[0].type}: {errors[0].message})" if errors else ""
    raise InvalidJob(
        f"none of {count} can be decoded, so the model's input size is not known; give preprocess.resize or crop, or "
        f"look at the input{reason}"
    )


def _format_size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
