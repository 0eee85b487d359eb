"""Image processors of transformers, converted to preprocessing settings and compared with the processors themselves."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from batchjob.models.huggingface_hub import silence_hub_libraries
from batchjob.models.huggingface_preprocessing import convert_image_processor
from batchjob.preprocessing.normalize import Normalizer
from batchjob.preprocessing.transforms import ResizeCrop


@pytest.fixture(scope="session", autouse=True)
def import_transformers() -> None:
    """Import a part of transformers that it imports on first use, because its imports emit warnings."""
    with silence_hub_libraries():
        transformers.AutoImageProcessor  # noqa: B018 - the attribute access imports it


PROCESSORS: dict[str, Callable[[], Any]] = {
    "squashed": lambda: transformers.ViTImageProcessor(size={"height": 32, "width": 32}),
    "not rescaled": lambda: transformers.ViTImageProcessor(
        size={"height": 32, "width": 40}, do_rescale=False, image_mean=[120.0] * 3, image_std=[60.0] * 3
    ),
    "not normalised": lambda: transformers.ViTImageProcessor(size={"height": 32, "width": 32}, do_normalize=False),
    "rescaled otherwise": lambda: transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3
    ),
    "cropped": lambda: transformers.CLIPImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}
    ),
    "convnext": lambda: transformers.ConvNextImageProcessor(size={"shortest_edge": 32}),
    "convnext, large": lambda: transformers.ConvNextImageProcessor(size={"shortest_edge": 384}),
    "levit": lambda: transformers.LevitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ),
    "mobilevit": lambda: transformers.MobileViTImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}
    ),
    "beit": lambda: transformers.BeitImageProcessor(size={"height": 32, "width": 32}),
    "rt-detr": lambda: transformers.RTDetrImageProcessor(size={"height": 32, "width": 32}),
    "no steps": lambda: transformers.ViTImageProcessor(do_resize=False, do_rescale=False, do_normalize=False),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_preprocessing_equals_that_of_the_image_processor(case: str, test_data: Path) -> None:
    processor = PROCESSORS[case]()
    preprocess = convert_image_processor(processor, "model.model")
    assert preprocess is not None
    geometry, normalize = ResizeCrop(preprocess), Normalizer(preprocess)
    for path in sorted((test_data / "imagenet-sample").rglob("*.JPEG"))[:3]:
        image = Image.open(path).convert("RGB")
        pixels = normalize(geometry(np.asarray(image).copy())[None], torch.float32)
        expected = processor(images=image, return_tensors="pt")["pixel_values"].float()
        assert pixels.shape == expected.shape
        if preprocess.crop is not None and isinstance(preprocess.resize, int):
            margins = [side * preprocess.resize // min(image.size) - expected.shape[-1] for side in image.size]
            # With such a margin the centre crop of torchvision is one pixel further.
            if any(margin % 4 == 3 for margin in margins):
                continue
        grey_level = (1 / 255 if preprocess.scale == "unit" else 1) / min(preprocess.std or (1.0,))
        # The processor resizes planes and the loader interleaved pixels, which torch rounds differently. Bicubic
        # interpolation overshoots at edges.
        assert (pixels - expected).abs().max() <= (16 if preprocess.interpolation == "bicubic" else 1.01) * grey_level
        assert (pixels - expected).abs().mean() <= 0.25 * grey_level


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("squashed", {"resize": (32, 32), "crop": None, "mean": (0.5,) * 3, "std": (0.5,) * 3, "scale": "unit"}),
        ("cropped", {"resize": 40, "crop": (32, 32), "interpolation": "bicubic"}),
        ("convnext", {"resize": 36, "crop": 32, "interpolation": "bicubic"}),
        ("convnext, large", {"resize": (384, 384), "crop": None}),
        ("not normalised", {"mean": None, "std": None, "scale": "unit"}),
        ("not rescaled", {"resize": (32, 40), "mean": (120.0,) * 3, "scale": "none"}),
        ("mobilevit", {"channels": "bgr"}),
        ("no steps", {"resize": None, "crop": None, "mean": None, "scale": "none"}),
    ],
)
def test_image_processor_is_converted_to_settings(case: str, expected: dict[str, Any]) -> None:
    preprocess = convert_image_processor(PROCESSORS[case](), "model.model")
    assert preprocess is not None
    assert {key: getattr(preprocess, key) for key in expected} == expected


@pytest.mark.parametrize(
    "make_processor",
    [
        lambda: transformers.DetrImageProcessor(size={"shortest_edge": 40, "longest_edge": 60}),
        lambda: transformers.EfficientNetImageProcessor(rescale_offset=True),
        lambda: transformers.ViTImageProcessor(resample=4),
    ],
)
def test_processor_that_settings_cannot_express_is_left_to_the_job(
    make_processor: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert convert_image_processor(make_processor(), "model.model: there") is None
    assert re.search("model.model: there: ('preprocess' has no words for what its|its image processor)", caplog.text)
