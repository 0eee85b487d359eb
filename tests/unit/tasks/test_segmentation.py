"""Segmentation: class maps and instances at the size of the original image, as PNG, run lengths and counts."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.models import get_model, get_model_weights
from torchvision.transforms import functional

import batchjob
from batchjob.errors import InvalidJob
from batchjob.models.torchvision import TorchvisionModel
from batchjob.preprocessing.geometry import ImageGeometry
from batchjob.storage.reader import Reader
from batchjob.tasks.postprocess import Postprocess
from batchjob.tasks.segmentation import SegmentationTask
from batchjob.tasks.settings import TaskContext
from tests.support.task_rows import build_rows, find_error_types

READER = Reader()
NAN = float("nan")
IMAGES = ("n01873310_platypus.JPEG", "n03825788_nipple.JPEG", "n04049303_rain_barrel.JPEG")  # 150x150, 106x150, 150x200
RCNN: dict[str, Any] = {
    "min_size": 64,
    "max_size": 96,
    "box_score_thresh": 0.0,
    "box_detections_per_img": 3,
    "rpn_post_nms_top_n_test": 20,
}

Row = dict[str, Any]
Map = np.ndarray[Any, Any]


@pytest.fixture
def folder(test_data: Path, tmp_path: Path) -> Path:
    """Folder with three photographs of three sizes."""
    path = tmp_path / "images"
    path.mkdir()
    for name in IMAGES:
        (path / name).write_bytes((test_data / "imagenet-sample" / name).read_bytes())
    return path


def run(folder: Path, **sections: Any) -> list[Row]:
    """Run a whole job over the folder; return the rows as DuckDB reads them, in the order of `IMAGES`."""
    output = folder.parent / "out"
    job = batchjob.Job.model_validate(
        {
            "input": {"type": "prefix", "uri": str(folder)},
            "model": {"type": "torchvision", "name": "lraspp_mobilenet_v3_large", "seed": 0},
            "task": {"type": "segmentation"},
            "runtime": {"pool": "local", "batch_size": 3},
            "output": {"uri": str(output)},
            **sections,
        }
    )
    assert batchjob.run(job).status == "complete"
    relation: Any = duckdb.sql(f"FROM read_parquet('{output}/predictions/') ORDER BY uri")
    rows: list[Row] = relation.to_arrow_table().to_pylist()
    assert [row["uri"].rsplit("/", 1)[1] for row in rows] == list(IMAGES)
    return rows


def read_pixels(folder: Path) -> list[torch.Tensor]:
    return [functional.pil_to_tensor(Image.open(folder / name).convert("RGB")) for name in IMAGES]


def make_model(name: str, **arguments: Any) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module: torch.nn.Module = get_model(name, weights=None, weights_backbone=None, **arguments)
    return module.eval()


def decode_png(data: bytes) -> Map:
    return np.asarray(Image.open(io.BytesIO(data)))


def decode_rle(runs: Row) -> Map:
    """Decode COCO's run lengths to a mask, uint8 of 0 and 1."""
    height, width = runs["size"]
    values = np.arange(len(runs["counts"])) % 2
    return np.repeat(values, runs["counts"]).reshape(width, height).T.astype(np.uint8)


# -- whole runs


@pytest.mark.parametrize("resize", [96, None, [64, 128]])
def test_class_maps_have_the_size_of_the_original(resize: Any, folder: Path) -> None:
    rows = run(folder, preprocess={"resize": resize})
    model = make_model("lraspp_mobilenet_v3_large")
    voc = set(get_model_weights("lraspp_mobilenet_v3_large")["DEFAULT"].meta["categories"])
    for row, image in zip(rows, read_pixels(folder), strict=True):
        height, width = image.shape[1:]
        small = image if resize is None else functional.resize(image, resize, antialias=True)
        values = functional.normalize(small.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        with torch.inference_mode():
            ids = model(values[None])["out"].argmax(1, keepdim=True)
        expected = interpolate(ids.float(), (height, width), mode="nearest-exact")[0, 0].numpy()
        mask = decode_png(row["mask"])
        assert mask.shape == (row["height"], row["width"]) == (height, width)
        assert mask.dtype == np.uint8
        assert np.mean(mask != expected) < 0.005
        assert sum(count["pixels"] for count in row["pixels"]) == width * height
        assert {count["label_id"]: count["pixels"] for count in row["pixels"]} == dict(
            zip(*(part.tolist() for part in np.unique(mask, return_counts=True)), strict=True)
        )
        assert {count["label"] for count in row["pixels"]} <= voc


def test_instances_match_torchvision(folder: Path) -> None:
    rows = run(
        folder,
        model={"type": "torchvision", "name": "maskrcnn_resnet50_fpn", "seed": 0, "arguments": RCNN},
        task={"type": "segmentation", "threshold": 0},
    )
    images = read_pixels(folder)
    with torch.inference_mode():
        expected_by_image = make_model("maskrcnn_resnet50_fpn", **RCNN)([image.float() / 255 for image in images])
    for row, expected, image in zip(rows, expected_by_image, images, strict=True):
        assert len(row["detections"]) == len(expected["scores"]) > 0
        for instance, expected_score, expected_mask in zip(
            row["detections"], expected["scores"].tolist(), expected["masks"], strict=True
        ):
            actual = decode_png(instance["mask"])
            assert instance["score"] == pytest.approx(expected_score, abs=1e-5)
            assert actual.shape == tuple(image.shape[1:])
            assert set(np.unique(actual)) <= {0, 255}
            assert np.count_nonzero(actual) == instance["pixels"]
            assert np.mean((actual > 0) != (expected_mask[0] >= 0.5).numpy()) < 0.005


def test_auxiliary_training_head_is_dropped_from_the_weights(tmp_path: Path) -> None:
    name = "deeplabv3_mobilenet_v3_large"
    model = make_model(name, num_classes=3, aux_loss=True)
    torch.save(model.state_dict(), tmp_path / "own.pt")
    loaded = TorchvisionModel(name=name, weights=str(tmp_path / "own.pt"), num_classes=3).load(READER, Path())
    assert loaded.input_kind == "batch"
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        output = loaded.module(x)
        assert list(output) == ["out"]
        torch.testing.assert_close(output["out"], model(x)["out"])


# -- outputs to rows


def make_postprocess(output: Any, weight_labels: tuple[str, ...] | None = None, **settings: Any) -> Postprocess:
    return SegmentationTask(**settings).build_postprocess(output, TaskContext(weight_labels, READER, Path()))


def make_logits(classes: int, height: int = 12, width: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, classes, height, width, generator=generator)


@pytest.mark.parametrize(
    "wrap",
    [lambda logits: logits, lambda logits: {"out": logits, "aux": logits * 0}, lambda logits: {"logits": logits}],
)
def test_png_run_lengths_and_counts_agree(wrap: Any) -> None:
    logits = make_logits(5)
    geometries = [ImageGeometry(20, 12, 20, 12)] * 2
    png_rows = build_rows(make_postprocess(wrap(logits)), wrap(logits), geometries)
    rle_rows = build_rows(make_postprocess(wrap(logits), mask="rle"), wrap(logits), geometries)
    count_rows = build_rows(make_postprocess(wrap(logits), mask="none"), wrap(logits), geometries)
    for index in range(2):
        expected = logits[index].argmax(0).numpy()
        np.testing.assert_array_equal(decode_png(png_rows[index]["mask"]), expected)
        assert png_rows[index]["pixels"] == rle_rows[index]["pixels"] == count_rows[index]["pixels"]
        assert list(count_rows[index]) == ["pixels"]
        counts = [one["pixels"] for one in count_rows[index]["pixels"]]
        assert counts == sorted(counts, reverse=True)
        assert sum(counts) == 240
        masks = rle_rows[index]["mask"]
        assert [one["label_id"] for one in masks] == [one["label_id"] for one in count_rows[index]["pixels"]]
        for one in masks:
            assert sum(one["counts"]) == 240
            np.testing.assert_array_equal(decode_rle(one), expected == one["label_id"])


def test_run_lengths_match_the_examples_of_coco() -> None:
    # The examples of maskApi.h: M = [0 0 1 1 1 0 1] has the counts [2 3 1 1], M = [1 1 1 1 1 1 0] has [0 6 1].
    for mask, counts in ([0, 0, 1, 1, 1, 0, 1], [2, 3, 1, 1]), ([1, 1, 1, 1, 1, 1, 0], [0, 6, 1]):
        output = torch.tensor(mask).float().view(1, 1, 7, 1).expand(2, 1, 7, 1) - 0.5
        (row, _) = build_rows(make_postprocess(output, mask="rle"), output, [ImageGeometry(1, 7, 1, 7)] * 2)
        inside = next(one for one in row["mask"] if one["label_id"] == 1)
        assert (inside["size"], inside["counts"]) == ([7, 1], counts)


def test_more_than_255_classes_take_16_bits() -> None:
    output = torch.zeros(2, 300, 4, 6)
    output[:, 299, 1, 2] = 9
    (row, _) = build_rows(
        make_postprocess(output, tuple(map(str, range(300)))), output, [ImageGeometry(6, 4, 6, 4)] * 2
    )
    mask = decode_png(row["mask"])
    assert (mask[1, 2], mask[0, 0], mask.dtype.itemsize > 1) == (299, 0, True)
    assert row["pixels"] == [
        {"label_id": 0, "label": "0", "pixels": 23},
        {"label_id": 299, "label": "299", "pixels": 1},
    ]


def test_single_logit_per_pixel_is_a_probability() -> None:
    output = torch.tensor([-3.0, 0.1, 3.0]).view(1, 1, 1, 3).expand(2, 1, 1, 3)
    for threshold, expected in (0.5, [0, 1, 1]), (0.9, [0, 0, 1]):
        postprocess = make_postprocess(output, ("ground", "road"), mask_threshold=threshold)
        (row, _) = build_rows(postprocess, output, [ImageGeometry(3, 1, 3, 1)] * 2)
        assert decode_png(row["mask"]).tolist() == [expected]


def test_pixels_outside_the_crop_have_no_class() -> None:
    output = make_logits(3, 8, 8)
    geometry = ImageGeometry(16, 12, 8, 8, left=4, top=2)
    (row, _) = build_rows(make_postprocess(output), output, [geometry] * 2)
    mask = decode_png(row["mask"])
    assert mask.shape == (12, 16)
    np.testing.assert_array_equal(mask[2:10, 4:12], output[0].argmax(0).numpy())
    assert np.count_nonzero(mask == 255) == 12 * 16 - 64
    assert sum(one["pixels"] for one in row["pixels"]) == 64
    (inner, _) = build_rows(make_postprocess(output, size="input"), output, [geometry] * 2)
    np.testing.assert_array_equal(decode_png(inner["mask"]), output[0].argmax(0).numpy())


@pytest.mark.parametrize("ratio", [1, 4])
def test_padding_is_left_out_at_every_map_resolution(ratio: int) -> None:
    output = make_logits(3, 32 // ratio, 64 // ratio)
    geometry = ImageGeometry(50, 20, 50, 20, pad_right=14, pad_below=12)
    expected = interpolate(output.argmax(1, keepdim=True).float(), (32, 64), mode="nearest")[0, 0, :20, :50].numpy()
    for size in ("original", "input"):
        (row, _) = build_rows(make_postprocess(output, size=size), output, [geometry] * 2)
        np.testing.assert_array_equal(decode_png(row["mask"]), expected)


def test_pixels_that_are_not_finite_are_an_error_or_have_no_class() -> None:
    output = make_logits(3, 4, 5)
    postprocess = make_postprocess(output)
    output[1, 2, 0, 0] = NAN
    first, second = build_rows(postprocess, output, [ImageGeometry(5, 4, 5, 4)] * 2)
    assert (first["mask"] is None, second) == (False, {"pixels": None, "mask": None})
    assert find_error_types(postprocess, output) == [None, "not_finite"]
    lenient = make_postprocess(make_logits(3, 4, 5), allow_nan=True)
    _, second = build_rows(lenient, output, [ImageGeometry(5, 4, 5, 4)] * 2)
    assert decode_png(second["mask"])[0, 0] == 255
    assert sum(one["pixels"] for one in second["pixels"]) == 19


def make_instances(images: int = 2, height: int = 10, width: int = 16) -> list[dict[str, torch.Tensor]]:
    """Make three rectangles for each image, one of them with a low score, unsorted."""
    masks = torch.zeros(3, 1, height, width)
    masks[0, :, 2:6, 3:9] = 0.8
    masks[1, :, 0:2, 0:2] = 0.9
    masks[2, :, 5:10, 8:16] = 0.6
    boxes = torch.tensor([[3.0, 2, 9, 6], [0, 0, 2, 2], [8, 5, 16, 10]])
    image = {"boxes": boxes, "labels": torch.tensor([1, 2, 1]), "scores": torch.tensor([0.7, 0.2, 0.9]), "masks": masks}
    return [image] * images


def test_each_instance_has_a_mask_at_the_size_of_the_image() -> None:
    output = make_instances()
    geometries = [ImageGeometry(32, 20, 16, 10, 0.5, 0.5), ImageGeometry(16, 10, 16, 10)]
    png_rows = build_rows(make_postprocess(output, ("ground", "cat", "dog")), output, geometries)
    rle_rows = build_rows(make_postprocess(output, mask="rle"), output, geometries)
    count_rows = build_rows(make_postprocess(output, mask="none"), output, geometries)
    for row, scale in enumerate((2, 1)):
        instances = png_rows[row]["detections"]
        assert [(png["label_id"], png["label"], png["score"]) for png in instances] == [
            (1, "cat", pytest.approx(0.9)),
            (1, "cat", pytest.approx(0.7)),
        ]
        assert [png["x_min"] for png in instances] == [8 * scale, 3 * scale]
        for png, rle, count, candidate in zip(
            instances, rle_rows[row]["detections"], count_rows[row]["detections"], (2, 0), strict=True
        ):
            expected = np.kron((output[0]["masks"][candidate, 0] >= 0.5).numpy(), np.ones((scale, scale), bool))
            np.testing.assert_array_equal(decode_png(png["mask"]) == 255, expected)
            np.testing.assert_array_equal(decode_rle(rle["mask"]), expected)
            assert png["pixels"] == rle["pixels"] == count["pixels"] == np.count_nonzero(expected)
            assert "mask" not in count


def test_images_of_several_sizes_and_without_instances_share_a_batch() -> None:
    no_instances = {key: value[:0] for key, value in make_instances(1, 30, 7)[0].items()}
    output = [make_instances(1)[0], no_instances, make_instances(1, 11, 19)[0]]
    geometries = [ImageGeometry(16, 10, 16, 10), ImageGeometry(7, 30, 7, 30), ImageGeometry(19, 11, 19, 11)]
    for mask in ("png", "rle", "none"):
        rows = build_rows(make_postprocess(output[:2], mask=mask), output, geometries)
        assert [len(row["detections"]) for row in rows] == [2, 0, 2]
    assert decode_png(
        build_rows(make_postprocess(output[:2]), output, geometries)[2]["detections"][0]["mask"]
    ).shape == (11, 19)


def test_instances_that_are_not_finite_are_an_error() -> None:
    bad = {**make_instances(1)[0], "masks": torch.full((3, 1, 10, 16), NAN)}
    output = [make_instances(1)[0], bad]
    postprocess = make_postprocess(make_instances())
    rows = build_rows(postprocess, output, [ImageGeometry(16, 10, 16, 10)] * 2)
    assert [row["detections"] is None for row in rows] == [False, True]


@pytest.mark.parametrize(
    ("output", "settings", "text"),
    [
        (torch.zeros(2, 5), {}, "gives float32 [2, 5] for a batch of 2"),
        (torch.zeros(3, 5, 4, 4), {}, "float32 [3, 5, 4, 4]"),
        (torch.zeros(2, 5, 4, 4, dtype=torch.int64), {}, "int64 [2, 5, 4, 4]"),
        ({"masks": torch.zeros(2, 5, 4, 4)}, {}, "a dict with the keys masks (masks float32 [2, 5, 4, 4])"),
        ((torch.zeros(2, 5, 4, 4), None), {}, "a tuple of 2"),
        ([{"boxes": torch.zeros(1, 4)}] * 2, {}, "the first a dict with the keys boxes"),
        (make_instances(), {"format": "semantic"}, "a tensor [n, classes, h, w] of logits"),
        (torch.zeros(2, 5, 4, 4), {"format": "instances"}, "masks [k, 1, h, w]"),
        (None, {}, "gives None"),
    ],
)
def test_other_outputs_are_refused_with_their_shapes(output: Any, settings: Row, text: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        make_postprocess(output, **settings)
    assert text in caught.value.message
    assert "segmentation wants" in caught.value.message
    assert "model.type: python" in caught.value.message


def test_wrong_number_of_labels_is_refused() -> None:
    with pytest.raises(InvalidJob, match=r"task\.labels has 2 labels, but the model gives 5 classes"):
        make_postprocess(make_logits(5), labels=["a", "b"])
