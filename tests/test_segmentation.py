"""Segmentation: class maps and instances on the pixels of the original image, as PNG, run lengths and counts."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
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
    """A folder with three real images of three sizes."""
    place = tmp_path / "images"
    place.mkdir()
    for name in IMAGES:
        (place / name).write_bytes((test_data / "imagenet-sample" / name).read_bytes())
    return place


def run(folder: Path, **sections: Any) -> list[Row]:
    """A whole job over the folder: rows as DuckDB reads them, in the order of `IMAGES`."""
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


def pixels(folder: Path) -> list[torch.Tensor]:
    return [functional.pil_to_tensor(Image.open(folder / name).convert("RGB")) for name in IMAGES]


def model(name: str, **arguments: Any) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module: torch.nn.Module = get_model(name, weights=None, weights_backbone=None, **arguments)
    return module.eval()


def png(data: bytes) -> Map:
    return np.asarray(Image.open(io.BytesIO(data)))


def unrun(runs: Row) -> Map:
    """COCO's run lengths as the mask they stand for."""
    height, width = runs["size"]
    values = np.arange(len(runs["counts"])) % 2
    return np.repeat(values, runs["counts"]).reshape(width, height).T.astype(np.uint8)


# ----------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("resize", [96, None, [64, 128]])
def test_class_maps_have_the_size_of_the_original(resize: Any, folder: Path) -> None:
    rows = run(folder, preprocess={"resize": resize})
    net = model("lraspp_mobilenet_v3_large")
    voc = set(get_model_weights("lraspp_mobilenet_v3_large")["DEFAULT"].meta["categories"])
    for row, image in zip(rows, pixels(folder), strict=True):
        height, width = image.shape[1:]
        small = image if resize is None else functional.resize(image, resize, antialias=True)
        values = functional.normalize(small.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        with torch.inference_mode():
            ids = net(values[None])["out"].argmax(1, keepdim=True)
        wanted = interpolate(ids.float(), (height, width), mode="nearest-exact")[0, 0].numpy()
        found = png(row["mask"])
        assert found.shape == (row["height"], row["width"]) == (height, width)
        assert found.dtype == np.uint8
        assert np.mean(found != wanted) < 0.005
        assert sum(one["pixels"] for one in row["pixels"]) == width * height
        assert {one["label_id"]: one["pixels"] for one in row["pixels"]} == dict(
            zip(*(part.tolist() for part in np.unique(found, return_counts=True)), strict=True)
        )
        assert {one["label"] for one in row["pixels"]} <= voc


def test_instances_are_torchvisions_own(folder: Path) -> None:
    rows = run(
        folder,
        model={"type": "torchvision", "name": "maskrcnn_resnet50_fpn", "seed": 0, "arguments": RCNN},
        task={"type": "segmentation", "threshold": 0},
    )
    images = pixels(folder)
    with torch.inference_mode():
        wanted = model("maskrcnn_resnet50_fpn", **RCNN)([image.float() / 255 for image in images])
    for row, want, image in zip(rows, wanted, images, strict=True):
        assert len(row["detections"]) == len(want["scores"]) > 0
        for one, score, mask in zip(row["detections"], want["scores"].tolist(), want["masks"], strict=True):
            found = png(one["mask"])
            assert one["score"] == pytest.approx(score, abs=1e-5)
            assert found.shape == tuple(image.shape[1:])
            assert set(np.unique(found)) <= {0, 255}
            assert np.count_nonzero(found) == one["pixels"]
            assert np.mean((found > 0) != (mask[0] >= 0.5).numpy()) < 0.005


def test_weights_with_the_head_for_training_are_read_without_it(tmp_path: Path) -> None:
    name = "deeplabv3_mobilenet_v3_large"
    net = model(name, num_classes=3, aux_loss=True)
    torch.save(net.state_dict(), tmp_path / "own.pt")
    made = TorchvisionModel(name=name, weights=str(tmp_path / "own.pt"), num_classes=3).load(READER, Path())
    assert made.input_kind == "batch"
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        found = made.module(x)
        assert list(found) == ["out"]
        torch.testing.assert_close(found["out"], net(x)["out"])


# ------------------------------------------------------------------------------------------------- outputs to rows


def prepared(output: Any, own: tuple[str, ...] | None = None, **settings: Any) -> Postprocess:
    return SegmentationTask(**settings).build_postprocess(output, own, READER, Path())


def rows(post: Postprocess, output: Any, frames: list[ImageGeometry]) -> list[Row]:
    tensors = {name: tensor.cpu() for name, tensor in post.on_device(output).items()}
    assert {len(tensor) for tensor in tensors.values()} == {len(frames)}
    columns = post.columns(tensors, frames)
    for column, field in zip(columns, post.fields, strict=True):
        column.validate(full=True)
        assert column.type == field.type
    found: list[Row] = pa.Table.from_arrays(columns, schema=pa.schema(post.fields)).to_pylist()
    return found


def logits(classes: int, height: int = 12, width: int = 20) -> torch.Tensor:
    own = torch.Generator().manual_seed(0)
    return torch.randn(2, classes, height, width, generator=own)


@pytest.mark.parametrize(
    "form", [lambda made: made, lambda made: {"out": made, "aux": made * 0}, lambda made: {"logits": made}]
)
def test_png_run_lengths_and_counts_tell_the_same(form: Any) -> None:
    made = logits(5)
    frames = [ImageGeometry(20, 12, 20, 12)] * 2
    images = rows(prepared(form(made)), form(made), frames)
    runs = rows(prepared(form(made), mask="rle"), form(made), frames)
    bare = rows(prepared(form(made), mask="none"), form(made), frames)
    for index in range(2):
        wanted = made[index].argmax(0).numpy()
        np.testing.assert_array_equal(png(images[index]["mask"]), wanted)
        assert images[index]["pixels"] == runs[index]["pixels"] == bare[index]["pixels"]
        assert list(bare[index]) == ["pixels"]
        counts = [one["pixels"] for one in bare[index]["pixels"]]
        assert counts == sorted(counts, reverse=True)
        assert sum(counts) == 240
        shown = runs[index]["mask"]
        assert [one["label_id"] for one in shown] == [one["label_id"] for one in bare[index]["pixels"]]
        for one in shown:
            assert sum(one["counts"]) == 240
            np.testing.assert_array_equal(unrun(one), wanted == one["label_id"])


def test_run_lengths_are_cocos() -> None:
    # The example of maskApi.h: M = [0 0 1 1 1 0 1] has the counts [2 3 1 1], M = [1 1 1 1 1 1 0] has [0 6 1].
    for mask, counts in ([0, 0, 1, 1, 1, 0, 1], [2, 3, 1, 1]), ([1, 1, 1, 1, 1, 1, 0], [0, 6, 1]):
        column = torch.tensor(mask).float().view(1, 1, 7, 1).expand(2, 1, 7, 1) - 0.5
        (row, _) = rows(prepared(column, mask="rle"), column, [ImageGeometry(1, 7, 1, 7)] * 2)
        inside = next(one for one in row["mask"] if one["label_id"] == 1)
        assert (inside["size"], inside["counts"]) == ([7, 1], counts)


def test_many_classes_take_16_bits() -> None:
    made = torch.zeros(2, 300, 4, 6)
    made[:, 299, 1, 2] = 9
    (row, _) = rows(prepared(made, tuple(map(str, range(300)))), made, [ImageGeometry(6, 4, 6, 4)] * 2)
    found = png(row["mask"])
    assert (found[1, 2], found[0, 0], found.dtype.itemsize > 1) == (299, 0, True)
    assert row["pixels"] == [
        {"label_id": 0, "label": "0", "pixels": 23},
        {"label_id": 299, "label": "299", "pixels": 1},
    ]


def test_one_logit_a_pixel_is_a_probability() -> None:
    made = torch.tensor([-3.0, 0.1, 3.0]).view(1, 1, 1, 3).expand(2, 1, 1, 3)
    for threshold, wanted in (0.5, [0, 1, 1]), (0.9, [0, 0, 1]):
        post = prepared(made, ("ground", "road"), mask_threshold=threshold)
        (row, _) = rows(post, made, [ImageGeometry(3, 1, 3, 1)] * 2)
        assert png(row["mask"]).tolist() == [wanted]


def test_what_the_crop_cut_off_is_no_class() -> None:
    made = logits(3, 8, 8)
    frame = ImageGeometry(16, 12, 8, 8, left=4, top=2)
    (row, _) = rows(prepared(made), made, [frame] * 2)
    found = png(row["mask"])
    assert found.shape == (12, 16)
    np.testing.assert_array_equal(found[2:10, 4:12], made[0].argmax(0).numpy())
    assert np.count_nonzero(found == 255) == 12 * 16 - 64
    assert sum(one["pixels"] for one in row["pixels"]) == 64
    (inner, _) = rows(prepared(made, size="input"), made, [frame] * 2)
    np.testing.assert_array_equal(png(inner["mask"]), made[0].argmax(0).numpy())


@pytest.mark.parametrize("ratio", [1, 4])
def test_padding_is_left_out_whatever_the_resolution_of_the_map(ratio: int) -> None:
    made = logits(3, 32 // ratio, 64 // ratio)
    frame = ImageGeometry(50, 20, 50, 20, pad_right=14, pad_below=12)
    wanted = interpolate(made.argmax(1, keepdim=True).float(), (32, 64), mode="nearest")[0, 0, :20, :50].numpy()
    for size in ("original", "input"):
        (row, _) = rows(prepared(made, size=size), made, [frame] * 2)
        np.testing.assert_array_equal(png(row["mask"]), wanted)


def test_pixels_that_are_not_finite_are_a_fault_or_no_class() -> None:
    made = logits(3, 4, 5)
    post = prepared(made)
    made[1, 2, 0, 0] = NAN
    first, second = rows(post, made, [ImageGeometry(5, 4, 5, 4)] * 2)
    assert (first["mask"] is None, second) == (False, {"pixels": None, "mask": None})
    assert [fault and fault.type for fault in post.find_errors(post.on_device(made))] == [None, "not_finite"]
    lenient = prepared(logits(3, 4, 5), allow_nan=True)
    _, second = rows(lenient, made, [ImageGeometry(5, 4, 5, 4)] * 2)
    assert png(second["mask"])[0, 0] == 255
    assert sum(one["pixels"] for one in second["pixels"]) == 19


def instances(images: int = 2, height: int = 10, width: int = 16) -> list[dict[str, torch.Tensor]]:
    """For each image three squares, one of them doubtful, in no order."""
    masks = torch.zeros(3, 1, height, width)
    masks[0, :, 2:6, 3:9] = 0.8
    masks[1, :, 0:2, 0:2] = 0.9
    masks[2, :, 5:10, 8:16] = 0.6
    boxes = torch.tensor([[3.0, 2, 9, 6], [0, 0, 2, 2], [8, 5, 16, 10]])
    one = {"boxes": boxes, "labels": torch.tensor([1, 2, 1]), "scores": torch.tensor([0.7, 0.2, 0.9]), "masks": masks}
    return [one] * images


def test_instances_have_a_mask_each_at_the_size_of_the_original() -> None:
    made = instances()
    frames = [ImageGeometry(32, 20, 16, 10, 0.5, 0.5), ImageGeometry(16, 10, 16, 10)]
    shown = rows(prepared(made, ("ground", "cat", "dog")), made, frames)
    runs = rows(prepared(made, mask="rle"), made, frames)
    bare = rows(prepared(made, mask="none"), made, frames)
    for index, scale in enumerate((2, 1)):
        found = shown[index]["detections"]
        assert [(one["label_id"], one["label"], one["score"]) for one in found] == [
            (1, "cat", pytest.approx(0.9)),
            (1, "cat", pytest.approx(0.7)),
        ]
        assert [one["x_min"] for one in found] == [8 * scale, 3 * scale]
        for one, other, third, place in zip(
            found, runs[index]["detections"], bare[index]["detections"], (2, 0), strict=True
        ):
            wanted = np.kron((made[0]["masks"][place, 0] >= 0.5).numpy(), np.ones((scale, scale), bool))
            np.testing.assert_array_equal(png(one["mask"]) == 255, wanted)
            np.testing.assert_array_equal(unrun(other["mask"]), wanted)
            assert one["pixels"] == other["pixels"] == third["pixels"] == np.count_nonzero(wanted)
            assert "mask" not in third


def test_images_of_other_sizes_and_without_instances_go_together() -> None:
    none = {key: value[:0] for key, value in instances(1, 30, 7)[0].items()}
    made = [instances(1)[0], none, instances(1, 11, 19)[0]]
    frames = [ImageGeometry(16, 10, 16, 10), ImageGeometry(7, 30, 7, 30), ImageGeometry(19, 11, 19, 11)]
    for mask in ("png", "rle", "none"):
        found = rows(prepared(made[:2], mask=mask), made, frames)
        assert [len(row["detections"]) for row in found] == [2, 0, 2]
    assert png(rows(prepared(made[:2]), made, frames)[2]["detections"][0]["mask"]).shape == (11, 19)


def test_instances_that_are_not_finite_are_a_fault() -> None:
    bad = {**instances(1)[0], "masks": torch.full((3, 1, 10, 16), NAN)}
    made = [instances(1)[0], bad]
    post = prepared(instances())
    found = rows(post, made, [ImageGeometry(16, 10, 16, 10)] * 2)
    assert [row["detections"] is None for row in found] == [False, True]


@pytest.mark.parametrize(
    ("output", "settings", "said"),
    [
        (torch.zeros(2, 5), {}, "gives float32 [2, 5] for a batch of 2"),
        (torch.zeros(3, 5, 4, 4), {}, "float32 [3, 5, 4, 4]"),
        (torch.zeros(2, 5, 4, 4, dtype=torch.int64), {}, "int64 [2, 5, 4, 4]"),
        ({"masks": torch.zeros(2, 5, 4, 4)}, {}, "a dict with the keys masks (masks float32 [2, 5, 4, 4])"),
        ((torch.zeros(2, 5, 4, 4), None), {}, "a tuple of 2"),
        ([{"boxes": torch.zeros(1, 4)}] * 2, {}, "the first a dict with the keys boxes"),
        (instances(), {"format": "semantic"}, "a tensor [n, classes, h, w] of logits"),
        (torch.zeros(2, 5, 4, 4), {"format": "instances"}, "masks [k, 1, h, w]"),
        (None, {}, "gives None"),
    ],
)
def test_other_outputs_are_refused_with_their_shapes(output: Any, settings: Row, said: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        prepared(output, **settings)
    assert said in caught.value.message
    assert "segmentation wants" in caught.value.message
    assert "model.type: python" in caught.value.message


def test_labels_that_are_not_as_many_as_the_classes_are_refused() -> None:
    with pytest.raises(InvalidJob, match=r"task\.labels has 2 labels, but the model gives 5 classes"):
        prepared(logits(5), labels=["a", "b"])
