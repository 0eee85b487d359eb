"""Detection: boxes of torchvision and DETR as rows, in pixels of the original image, however it was prepared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torchvision.models import get_model, get_model_weights
from torchvision.ops import batched_nms, box_convert
from torchvision.transforms import functional

import batchjob
from batchjob.errors import InvalidJob
from batchjob.models.checkpoint import CheckpointModel
from batchjob.models.torchvision import TorchvisionModel
from batchjob.preprocessing.geometry import ImageGeometry
from batchjob.preprocessing.settings import Preprocess
from batchjob.storage.reader import Reader
from batchjob.tasks.detection import DetectionTask
from batchjob.tasks.postprocess import Postprocess
from batchjob.tasks.settings import TaskContext
from tests.support.task_rows import build_rows

READER = Reader()
NAN = float("nan")
IMAGES = ("n03825788_nipple.JPEG", "n01873310_platypus.JPEG", "n04049303_rain_barrel.JPEG")  # 106x150, 150x150, 150x200
DETECTOR = "fasterrcnn_mobilenet_v3_large_320_fpn"
ARGUMENTS: dict[str, Any] = {"box_score_thresh": 0.0, "box_detections_per_img": 12, "rpn_post_nms_top_n_test": 60}

Row = dict[str, Any]


@pytest.fixture
def folder(test_data: Path, tmp_path: Path) -> Path:
    """Folder with three photographs of three sizes."""
    path = tmp_path / "images"
    path.mkdir()
    for name in IMAGES:
        (path / name).write_bytes((test_data / "imagenet-sample" / name).read_bytes())
    return path


def run(folder: Path, job_folder: Path | None = None, **sections: Any) -> dict[str, list[Row]]:
    """Run a whole job over the folder; return the detections of each image by its name, unnested by DuckDB."""
    output = folder.parent / "out"
    document = {
        "input": {"type": "prefix", "uri": str(folder)},
        "model": {"type": "torchvision", "name": DETECTOR, "seed": 0, "arguments": ARGUMENTS},
        "task": {"type": "detection", "threshold": 0, "max_boxes": 12},
        "runtime": {"pool": "local", "batch_size": 3},
        "output": {"uri": str(output)},
        **sections,
    }
    if job_folder is None:
        job = batchjob.Job.model_validate(document)
    else:
        (job_folder / "job.yaml").write_text(json.dumps(document))
        job = batchjob.Job.from_file(job_folder / "job.yaml")
    assert batchjob.run(job).status == "complete"
    rows_by_name: dict[str, list[Row]] = {name: [] for name in IMAGES}
    query = f"SELECT uri, unnest(detections, recursive := true) FROM read_parquet('{output}/predictions/')"
    result = duckdb.connect().execute(query)
    columns = [column[0] for column in result.description or ()]
    for row in result.fetchall():
        cells = dict(zip(columns, row, strict=True))
        rows_by_name[cells.pop("uri").rsplit("/", 1)[1]].append(cells)
    return rows_by_name


def read_pixels(folder: Path) -> list[torch.Tensor]:
    """Read the images as uint8 `[3, h, w]`."""
    return [functional.pil_to_tensor(Image.open(folder / name).convert("RGB")) for name in sorted(IMAGES)]


def run_torchvision(images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Detect objects with torchvision itself, from images in 0 to 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_model(DETECTOR, weights=None, weights_backbone=None, **ARGUMENTS).eval()
    # One thread, as in a run: with random weights, the last bit decides which of two boxes with similar scores is kept.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            detections: list[dict[str, torch.Tensor]] = model([image.float() / 255 for image in images])
    finally:
        torch.set_num_threads(threads)
    return detections


def assert_same_boxes(rows_by_name: dict[str, list[Row]], expected_by_image: list[dict[str, torch.Tensor]]) -> None:
    """Compare boxes; those with similar scores may come in another order."""
    for name, expected in zip(sorted(IMAGES), expected_by_image, strict=True):
        rows = rows_by_name[name]
        assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
        assert len(rows) == len(expected["scores"]) > 0
        actual_boxes = sorted((row["label_id"], row["x_min"], row["y_min"], row["x_max"], row["y_max"]) for row in rows)
        expected_boxes = sorted(
            (label, *box) for label, box in zip(expected["labels"].tolist(), expected["boxes"].tolist(), strict=True)
        )
        for actual, box in zip(actual_boxes, expected_boxes, strict=True):
            assert actual == pytest.approx(box, abs=2e-2)
        assert [row["score"] for row in rows] == pytest.approx(expected["scores"].tolist(), abs=1e-5)


# -- whole runs


def test_boxes_of_images_of_three_sizes_match_torchvision(folder: Path) -> None:
    rows_by_name = run(folder)
    assert_same_boxes(rows_by_name, run_torchvision(read_pixels(folder)))
    assert {(row["label"], row["label_id"]) for rows in rows_by_name.values() for row in rows} <= read_coco_categories()


def read_coco_categories() -> set[tuple[str, int]]:
    names = get_model_weights(DETECTOR)["DEFAULT"].meta["categories"]
    return {(name, number) for number, name in enumerate(names)}


def test_boxes_of_padded_images_are_clipped_at_the_image(folder: Path) -> None:
    rows_by_name = run(folder, preprocess={"sizes": "group", "pad": 32})
    images = read_pixels(folder)
    expected_by_image = run_torchvision(
        [functional.pad(image, [0, 0, *(-side % 32 for side in image.shape[:0:-1])]) for image in images]
    )
    for expected, image in zip(expected_by_image, images, strict=True):
        height, width = image.shape[1:]
        inside = (expected["boxes"][:, 0] <= width) & (expected["boxes"][:, 1] <= height)
        expected.update({key: value[inside] for key, value in expected.items()})
        expected["boxes"] = expected["boxes"].minimum(torch.tensor([width, height] * 2))
    assert_same_boxes(rows_by_name, expected_by_image)


def test_boxes_of_resized_and_cropped_images_are_mapped_back(folder: Path) -> None:
    rows_by_name = run(folder, preprocess={"resize": 120, "crop": [110, 100]})
    expected_by_image, images = [], read_pixels(folder)
    resized_images = [functional.resize(image, 120, antialias=True) for image in images]
    for expected, resized, image in zip(
        run_torchvision([functional.center_crop(image, [110, 100]) for image in resized_images]),
        resized_images,
        images,
        strict=True,
    ):
        (height, width), (resized_height, resized_width) = image.shape[1:], resized.shape[1:]
        cut = torch.tensor([round((resized_width - 100) / 2), round((resized_height - 110) / 2)] * 2)
        boxes = (expected["boxes"] + cut) / torch.tensor([resized_width / width, resized_height / height] * 2)
        expected_by_image.append({**expected, "boxes": boxes})
    assert_same_boxes(rows_by_name, expected_by_image)


DETR = """
import torch

class Queries(torch.nn.Module):
    # Two queries: a box around the bright square, and "no object".
    def forward(self, x):
        n, _, height, width = x.shape
        boxes = []
        for image in x:
            rows, columns = (image[0] > 0.5).nonzero().unbind(1)
            left, right = columns.min() / width, (columns.max() + 1) / width
            top, bottom = rows.min() / height, (rows.max() + 1) / height
            boxes.append(torch.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]))
        boxes = torch.stack(boxes)[:, None]
        logits = torch.tensor([[0.0, 4.0, 0.0], [0.0, 0.0, 9.0]]).expand(n, 2, 3)
        return {"logits": logits, "pred_boxes": torch.cat([boxes, boxes], 1)}

def build():
    return Queries()
"""


@pytest.mark.parametrize(
    "preprocess",
    [
        {"resize": None, "crop": None, "sizes": "group", "pad": 64},
        {"resize": [100, 100], "crop": None},
        {"resize": 200, "crop": [160, 160]},
        {"resize": None, "crop": 300},
    ],
    ids=["padded", "squeezed", "cropped", "enlarged by the crop"],
)
def test_detr_boxes_are_mapped_to_the_image(preprocess: Row, tmp_path: Path) -> None:
    images, job_folder = tmp_path / "images", tmp_path / "job"
    images.mkdir()
    job_folder.mkdir()
    (job_folder / "net.py").write_text(DETR)
    for name, size in zip(IMAGES, [(120, 160), (200, 150), (150, 150)], strict=True):
        image = Image.new("RGB", size)
        image.paste((255, 255, 255), (60, 50, 90, 100))
        image.save(images / name, "PNG")
    rows_by_name = run(
        images,
        job_folder,
        model={"type": "python", "target": "net:build"},
        preprocess={"mean": None, "std": None, **preprocess},
        task={"type": "detection", "threshold": 0.5, "labels": ["cat", "dog"]},
    )
    for name in IMAGES:
        (row,) = rows_by_name[name]
        assert (row["label_id"], row["label"]) == (1, "dog")
        assert [row[key] for key in ("x_min", "y_min", "x_max", "y_max")] == pytest.approx([60, 50, 90, 100], abs=1.6)


def test_torchvision_detector_brings_labels_and_does_its_own_preprocessing() -> None:
    loaded = TorchvisionModel(name="ssdlite320_mobilenet_v3_large", seed=0).load(READER, Path())
    assert (loaded.input_kind, loaded.labels and loaded.labels[1]) == ("list", "person")
    preprocess = Preprocess(resize=None, crop=None, mean=None, std=None)
    assert loaded.preprocess == preprocess
    assert not any(part.training for part in loaded.module.modules())


def test_detector_is_built_by_name_for_own_weights(tmp_path: Path) -> None:
    net = get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=4).eval()
    torch.save(net.state_dict(), tmp_path / "own.pt")
    weights = str(tmp_path / "own.pt")
    by_name = TorchvisionModel(name="ssdlite320_mobilenet_v3_large", weights=weights, num_classes=4).load(
        READER, Path()
    )
    checkpoint = CheckpointModel(architecture="ssdlite320_mobilenet_v3_large", weights=weights, num_classes=4)
    for loaded in (by_name, checkpoint.load(READER, Path())):
        assert (loaded.input_kind, loaded.labels) == ("list", None)
        images = [torch.rand(3, 64, 80), torch.rand(3, 90, 60)]
        with torch.inference_mode():
            for actual, expected in zip(loaded.module(list(images)), net(list(images)), strict=True):
                torch.testing.assert_close(actual, expected)


def test_published_weights_are_built_like_torchvision_builds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = get_model_weights("ssdlite320_mobilenet_v3_large")["COCO_V1"]
    file = tmp_path / "checkpoints" / weights.url.rsplit("/", 1)[1]
    file.parent.mkdir()
    fresh = get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None)
    torch.save(fresh.state_dict(), file)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    expected = get_model("ssdlite320_mobilenet_v3_large", weights=weights).eval()
    loaded = TorchvisionModel(name="ssdlite320_mobilenet_v3_large", weights=str(file)).load(READER, Path())
    images = [torch.rand(3, 64, 80)]
    with torch.inference_mode():
        torch.testing.assert_close(loaded.module(list(images)), expected(list(images)))
    assert loaded.labels == tuple(weights.meta["categories"])


# -- outputs to rows


def build_detections(
    postprocess: Postprocess, output: Any, geometries: list[ImageGeometry] | None = None
) -> list[list[Row] | None]:
    images = len(output["logits"]) if isinstance(output, Mapping) else len(output)
    rows = build_rows(postprocess, output, geometries or [ImageGeometry(1000, 1000, 1000, 1000)] * images)
    assert len(rows) == images
    return [row["detections"] for row in rows]


def make_image(boxes: int, seed: int = 0, classes: int = 3) -> dict[str, torch.Tensor]:
    """Make the boxes of an image, unsorted; many of them overlap."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(boxes, 2, generator=generator) * 100
    size = torch.rand(boxes, 2, generator=generator) * 100 + 50
    return {
        "boxes": torch.cat([corner, corner + size], 1),
        "labels": torch.randint(0, classes, (boxes,), generator=generator),
        "scores": torch.rand(boxes, generator=generator),
    }


def make_postprocess(output: Any, weight_labels: tuple[str, ...] | None = None, **settings: Any) -> Postprocess:
    return DetectionTask(**settings).build_postprocess(output, TaskContext(weight_labels, READER, Path()))


def test_schema_of_the_column() -> None:
    floats = {name: pa.float32() for name in ("score", "x_min", "y_min", "x_max", "y_max")}
    struct = pa.struct([("label_id", pa.int32()), ("label", pa.string()), *floats.items()])
    assert make_postprocess([make_image(3), make_image(0)]).fields == [pa.field("detections", pa.list_(struct))]


def test_threshold_and_max_boxes_keep_the_best() -> None:
    output = [make_image(40), make_image(2, 1), make_image(0)]
    detections = build_detections(make_postprocess(output[:2], threshold=0.3, max_boxes=5), output)
    for rows, expected in zip(detections, output, strict=True):
        scores = sorted((score for score in expected["scores"].tolist() if score >= 0.3), reverse=True)[:5]
        assert rows is not None
        assert [row["score"] for row in rows] == scores
    assert detections[2] == []


@pytest.mark.parametrize("nms", [0.2, 0.5])
def test_suppression_matches_torchvision(nms: float) -> None:
    output = [make_image(40), make_image(30, 1)]
    detections = build_detections(make_postprocess(output, threshold=0.1, nms=nms), output)
    for rows, expected in zip(detections, output, strict=True):
        above = expected["scores"] >= 0.1
        boxes, scores, labels = expected["boxes"][above], expected["scores"][above], expected["labels"][above]
        kept = batched_nms(boxes, scores, labels, nms)
        assert rows is not None
        assert 0 < len(rows) == len(kept) < len(scores)
        assert [row["score"] for row in rows] == scores[kept].tolist()
        assert [[row["x_min"], row["y_min"], row["x_max"], row["y_max"]] for row in rows] == boxes[kept].tolist()


def make_queries(classes: int, images: int = 2, number: int = 20) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(classes)
    boxes = torch.rand(images, number, 4, generator=generator) * 0.3 + 0.2
    return {"logits": torch.randn(images, number, classes, generator=generator) * 3, "pred_boxes": boxes}


@pytest.mark.parametrize("weight_labels", [None, ("a", "b", "c")], ids=["unknown labels", "one label less"])
def test_softmax_ignores_the_last_class(weight_labels: tuple[str, ...] | None) -> None:
    output = make_queries(4)
    detections = build_detections(
        make_postprocess(output, weight_labels, threshold=0.5), output, [ImageGeometry(400, 200, 400, 200)] * 2
    )
    scores, labels = output["logits"].softmax(2)[..., :-1].max(2)
    for index, rows in enumerate(detections):
        assert rows is not None
        order = [query for query in scores[index].argsort(descending=True).tolist() if scores[index, query] >= 0.5]
        assert [row["label_id"] for row in rows] == labels[index, order].tolist()
        assert [row["score"] for row in rows] == pytest.approx(scores[index, order].tolist())
        assert {row["label"] for row in rows} <= ({None} if weight_labels is None else set(weight_labels))
        boxes = box_convert(output["pred_boxes"][index, order], "cxcywh", "xyxy") * torch.tensor([400, 200, 400, 200])
        actual = torch.tensor([[row["x_min"], row["y_min"], row["x_max"], row["y_max"]] for row in rows])
        torch.testing.assert_close(actual, boxes.clamp(min=0).minimum(torch.tensor([400, 200, 400, 200])))


def test_as_many_labels_as_logits_mean_sigmoid() -> None:
    output = make_queries(4)
    detections = build_detections(make_postprocess(output, tuple("abcd"), threshold=0.5), output)
    unlabelled = build_detections(make_postprocess(output, scores="sigmoid", threshold=0.5), output)
    for index, rows in enumerate(detections):
        assert unlabelled[index] == [{**row, "label": None} for row in rows or ()]
        scores = output["logits"][index].sigmoid().flatten().sort(descending=True).values
        assert rows is not None
        assert [row["score"] for row in rows] == pytest.approx([score for score in scores.tolist() if score >= 0.5])


@pytest.mark.filterwarnings("ignore::Warning")  # from the imports of transformers
@pytest.mark.parametrize("family", ["detr", "rt_detr", "deformable_detr"])
def test_detr_output_matches_the_postprocessing_of_transformers(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    prefix = {"detr": "Detr", "rt_detr": "RTDetr", "deformable_detr": "DeformableDetr"}[family]
    processor = getattr(transformers, f"{prefix}ImageProcessor")()
    output_class = getattr(
        __import__(f"transformers.models.{family}.modeling_{family}", fromlist=["_"]), f"{prefix}ObjectDetectionOutput"
    )
    classes = 5 if family == "detr" else 4
    extra_keys = {} if family == "detr" else {"init_reference_points": torch.zeros(2, 120, 4)}
    output = output_class(**make_queries(classes, number=120), **extra_keys)
    expected_by_image = processor.post_process_object_detection(output, threshold=0.4, target_sizes=[(300, 500)] * 2)
    detections = build_detections(
        make_postprocess(output, threshold=0.4), output, [ImageGeometry(500, 300, 640, 480, 640 / 500, 480 / 300)] * 2
    )
    for rows, expected in zip(detections, expected_by_image, strict=True):
        assert rows is not None
        assert len(rows) == min(len(expected["scores"]), 100) > 0
        for row, index in zip(rows, expected["scores"].argsort(descending=True).tolist()[:100], strict=True):
            assert (row["score"], row["label_id"]) == (
                pytest.approx(float(expected["scores"][index])),
                expected["labels"][index],
            )
            corners = expected["boxes"][index].clamp(min=0).minimum(torch.tensor([500, 300, 500, 300]))
            assert [row[key] for key in ("x_min", "y_min", "x_max", "y_max")] == pytest.approx(
                corners.tolist(), abs=1e-3
            )


def test_ids_beyond_the_labels_have_a_null_label() -> None:
    output = [make_image(30), make_image(30, 1)]
    detections = build_detections(make_postprocess(output, labels=["zero", "one"]), output)
    assert detections[0] is not None
    assert {(row["label_id"], row["label"]) for row in detections[0]} == {(0, "zero"), (1, "one"), (2, None)}


def test_wrong_number_of_labels_is_refused() -> None:
    with pytest.raises(InvalidJob, match=r"task\.labels has 2 labels, but the model gives 4 classes"):
        make_postprocess(make_queries(5), labels=["a", "b"])


def make_outputs_with_nan() -> list[list[dict[str, torch.Tensor]]]:
    in_scores, in_boxes = make_image(4), make_image(4)
    in_scores["scores"][2] = NAN
    in_boxes["boxes"][1, 3] = float("inf")
    return [[make_image(3), in_scores], [make_image(3), in_boxes]]


@pytest.mark.parametrize("output", make_outputs_with_nan(), ids=["scores", "boxes"])
def test_boxes_that_are_not_finite_are_errors_or_dropped(output: Any) -> None:
    postprocess = make_postprocess([make_image(3), make_image(3)], threshold=0)
    first, second = build_detections(postprocess, output)
    assert first is not None
    assert (len(first), second) == (3, None)
    errors = postprocess.find_errors(postprocess.on_device(output))
    assert [error and error.type for error in errors] == [None, "not_finite"]
    lenient = make_postprocess([make_image(3), make_image(3)], threshold=0, allow_nan=True)
    rest = build_detections(lenient, output)[1]
    assert rest is not None
    assert len(rest) == 3
    assert lenient.find_errors(lenient.on_device(output)) == [None, None]


def test_detr_output_that_is_not_finite_is_an_error() -> None:
    output = make_queries(4)
    output["logits"][1, 3, 0] = NAN
    postprocess = make_postprocess(make_queries(4), threshold=0)
    assert [rows is None for rows in build_detections(postprocess, output)] == [False, True]


@pytest.mark.parametrize(
    ("output", "settings", "text"),
    [
        (torch.zeros(2, 5), {}, "gives float32 [2, 5] for a batch of 2"),
        (({}, [make_image(1), make_image(1)]), {}, "a tuple of 2"),
        ([make_image(1)], {}, "a list of 1, the first a dict with the keys boxes, labels, scores"),
        (
            [{"boxes": torch.zeros(1, 4)}] * 2,
            {},
            "a list of 2, the first a dict with the keys boxes (boxes float32 [1, 4])",
        ),
        ([{**make_image(2), "labels": torch.zeros(3)}] * 2, {}, "labels float32 [3]"),
        ([{**make_image(2), "boxes": torch.zeros(2, 5)}] * 2, {}, "boxes float32 [2, 5]"),
        ({"logits": torch.zeros(2, 7, 4)}, {}, "a dict with the keys logits (logits float32 [2, 7, 4])"),
        ({"logits": torch.zeros(2, 7, 4), "pred_boxes": torch.zeros(2, 6, 4)}, {}, "pred_boxes float32 [2, 6, 4]"),
        (make_queries(4, images=3), {}, "logits float32 [3, 20, 4]"),
        (make_queries(4), {"format": "torchvision"}, "a list with a dict for each image"),
        ([make_image(1), make_image(1)], {"format": "detr"}, "logits [n, q, classes]"),
        (None, {}, "gives None"),
    ],
)
def test_other_outputs_are_refused_with_their_shapes(output: Any, settings: Row, text: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        make_postprocess(output, **settings)
    assert text in caught.value.message
    assert "detection wants" in caught.value.message
    assert "model.type: python" in caught.value.message


def test_single_logit_is_a_sigmoid_score() -> None:
    output = make_queries(1)
    (first, _) = build_detections(make_postprocess(output, threshold=0), output)
    assert first is not None
    assert [row["score"] for row in first] == pytest.approx(
        output["logits"][0, :, 0].sigmoid().sort(descending=True).values.tolist()
    )


def test_softmax_over_one_class_is_refused() -> None:
    with pytest.raises(InvalidJob, match=r"task\.scores: softmax .* write sigmoid"):
        make_postprocess(make_queries(1), scores="softmax")


@pytest.mark.parametrize("settings", [{"threshold": 2}, {"nms": -1}, {"max_boxes": 0}, {"format": "yolo"}])
def test_settings_out_of_range_are_refused(settings: Row) -> None:
    with pytest.raises(InvalidJob):
        DetectionTask(**settings)


def test_row_bytes_bounds_the_column() -> None:
    task = DetectionTask(threshold=0, max_boxes=30, labels=["a", "bb", "ccc"])
    output = [make_image(50), make_image(50, 1)]
    postprocess = task.build_postprocess(output, TaskContext(None, READER, Path()))
    (column,) = postprocess.columns(postprocess.on_device(output), [ImageGeometry(1000, 1000, 1000, 1000)] * 2)
    assert column.nbytes / 2 <= task.row_bytes


def test_boxes_in_the_padding_are_dropped_and_others_clipped() -> None:
    image = {
        "boxes": torch.tensor([[90.0, 10, 120, 40], [101, 10, 120, 40], [-5, -5, 30, 20]]),
        "labels": torch.zeros(3, dtype=torch.long),
        "scores": torch.tensor([0.9, 0.8, 0.7]),
    }
    (rows, _) = build_detections(
        make_postprocess([image, image]),
        [image, image],
        [ImageGeometry(100, 50, 100, 50, pad_right=28, pad_below=14)] * 2,
    )
    assert rows is not None
    corners = [[row["x_min"], row["y_min"], row["x_max"], row["y_max"]] for row in rows]
    assert corners == [[90, 10, 100, 40], [0, 0, 30, 20]]


def test_keypoints_are_not_dropped_in_silence() -> None:
    image = {
        "boxes": torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
        "labels": torch.ones(1, dtype=torch.int64),
        "scores": torch.ones(1),
        "keypoints": torch.zeros(1, 17, 3),
        "keypoints_scores": torch.zeros(1, 17),
    }
    with pytest.raises(
        InvalidJob, match=r"gives keypoints beside its boxes, .* or task\.keypoints: drop for the boxes"
    ):
        DetectionTask().build_postprocess([image, image], TaskContext(None, READER, Path.cwd()))
    DetectionTask(keypoints="drop").build_postprocess([image, image], TaskContext(None, READER, Path.cwd()))


def test_plans_of_earlier_versions_go_on_without_keypoints(tmp_path: Path) -> None:
    document = {
        "input": {"type": "prefix", "uri": str(tmp_path)},
        "model": {"type": "torchvision", "name": "keypointrcnn_resnet50_fpn", "seed": 0},
        "task": {"type": "detection"},
        "output": {"uri": str(tmp_path / "out")},
    }
    job = batchjob.Job.model_validate(document)
    for defaults, keypoints in (({}, "drop"), (job.resolved_settings(), "refuse")):
        task = job.with_defaults(defaults).task
        assert isinstance(task, DetectionTask)
        assert task.keypoints == keypoints
