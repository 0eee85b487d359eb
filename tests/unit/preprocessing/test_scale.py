"""Mean and deviation of another scale than `preprocess.scale`."""

from __future__ import annotations

from typing import Any

import pytest

from batchjob.errors import InvalidJob
from batchjob.preprocessing.settings import Preprocess, merge_preprocess

BYTES = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
UNIT = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def merge(own: Preprocess | None = None, **settings: Any) -> Preprocess:
    return merge_preprocess(Preprocess(**({} if own else {"resize": None, "crop": None}), **settings), own)


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        (BYTES, "write preprocess.scale: none, or divide"),
        ({"mean": [104, 117, 123], "std": [1, 1, 1], "channels": "bgr"}, "scale: none"),  # Caffe
        ({"mean": [0, 0, 0], "std": [255, 255, 255]}, "scale: none"),
        (UNIT | {"scale": "none"}, "write preprocess.scale: unit, or multiply"),
        ({"mean": [0.5], "std": [0.5], "channels": "gray", "scale": "none"}, "scale: unit"),
        ({"mean": [0, 0, 0], "std": [0.5, 0.5, 0.5], "scale": "none"}, "scale: unit"),
    ],
)
def test_moments_of_another_scale_are_refused(settings: dict[str, Any], advice: str) -> None:
    with pytest.raises(InvalidJob, match=advice):
        merge(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        UNIT,
        BYTES | {"scale": "none"},
        {"mean": [0, 0, 0], "std": [1, 1, 1]},
        {"mean": [0, 0, 0], "std": [1, 1, 1], "scale": "none"},
        {"mean": [127.5, 127.5, 127.5], "std": [1, 1, 1], "scale": "none"},
        {"mean": [0.1307], "std": [0.3081], "channels": "gray"},
        {"mean": None, "std": None, "scale": "none"},
    ],
)
def test_moments_of_the_scale_pass(settings: dict[str, Any]) -> None:
    assert merge(**settings).scale == settings.get("scale", "unit")


def test_scale_of_the_weights_counts_where_the_job_gives_none() -> None:
    own = Preprocess(resize=256, crop=224, **(BYTES | {"scale": "none"}))
    assert merge(own, resize=300).mean == tuple(BYTES["mean"])
    with pytest.raises(InvalidJob, match="scale: none leaves them at 0-255"):
        merge(own, **UNIT)
