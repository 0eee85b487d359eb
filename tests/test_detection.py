"""Detection: torchvision's and DETR's boxes as rows, in pixels of the original, whatever was done to it before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
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

READER = Reader()
NAN = float("nan")
IMAGES = ("n03825788_nipple.JPEG", "n01873310_platypus.JPEG", "n04049303_rain_barrel.JPEG")  # 106x150, 150x150, 150x200
DETECTOR = "fasterrcnn_mobilenet_v3_large_320_fpn"
ARGUMENTS: dict[str, Any] = {"box_score_thresh": 0.0, "box_detections_per_img": 12, "rpn_post_nms_top_n_test": 60}

Row = dict[str, Any]


@pytest.fixture
def folder(test_data: Path, tmp_path: Path) -> Path:
    """A folder with three real images of three sizes."""
    place = tmp_path / "images"
    place.mkdir()
    for name in IMAGES:
        (place / name).write_bytes((test_data / "imagenet-sample" / name).read_bytes())
    return place


def run(folder: Path, base: Path | None = None, **sections: Any) -> dict[str, list[Row]]:
    """A whole job over the folder: what DuckDB unnests for each image, by its name."""
    output = folder.parent / "out"
    doc = {
        "input": {"type": "prefix", "uri": str(folder)},
        "model": {"type": "torchvision", "name": DETECTOR, "seed": 0, "arguments": ARGUMENTS},
        "task": {"type": "detection", "threshold": 0, "max_boxes": 12},
        "runtime": {"pool": "local", "batch_size": 3},
        "output": {"uri": str(output)},
        **sections,
    }
    if base is None:
        job = batchjob.Job.model_validate(doc)
    else:
        (base / "job.yaml").write_text(json.dumps(doc))
        job = batchjob.Job.from_file(base / "job.yaml")
    assert batchjob.run(job).status == "complete"
    found: dict[str, list[Row]] = {name: [] for name in IMAGES}
    query = f"SELECT uri, unnest(detections, recursive := true) FROM read_parquet('{output}/predictions/')"
    answer = duckdb.connect().execute(query)
    columns = [column[0] for column in answer.description or ()]
    for row in answer.fetchall():
        one = dict(zip(columns, row, strict=True))
        found[one.pop("uri").rsplit("/", 1)[1]].append(one)
    return found


def pixels(folder: Path) -> list[torch.Tensor]:
    """The images as uint8 `[3, h, w]`."""
    return [functional.pil_to_tensor(Image.open(folder / name).convert("RGB")) for name in sorted(IMAGES)]


def detected(images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """What torchvision itself makes of images in 0 to 1, in one thread, as a lane of ours.

    These weights are random: which of two boxes with almost the same score is kept hangs on the last bit.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_model(DETECTOR, weights=None, weights_backbone=None, **ARGUMENTS).eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            found: list[dict[str, torch.Tensor]] = model([image.float() / 255 for image in images])
    finally:
        torch.set_num_threads(threads)
    return found


def assert_same(found: dict[str, list[Row]], wanted: list[dict[str, torch.Tensor]]) -> None:
    """The same boxes, whatever the order of those with almost the same score."""
    for name, want in zip(sorted(IMAGES), wanted, strict=True):
        rows = found[name]
        assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
        assert len(rows) == len(want["scores"]) > 0
        ours = sorted((row["label_id"], row["x_min"], row["y_min"], row["x_max"], row["y_max"]) for row in rows)
        theirs = sorted(
            (label, *box) for label, box in zip(want["labels"].tolist(), want["boxes"].tolist(), strict=True)
        )
        for one, other in zip(ours, theirs, strict=True):
            assert one == pytest.approx(other, abs=2e-2)
        assert [row["score"] for row in rows] == pytest.approx(want["scores"].tolist(), abs=1e-5)


# ----------------------------------------------------------------------------------------------------- whole runs


def test_boxes_of_originals_of_three_sizes_are_torchvisions_own(folder: Path) -> None:
    found = run(folder)
    assert_same(found, detected(pixels(folder)))
    assert {(row["label"], row["label_id"]) for some in found.values() for row in some} <= coco()


def coco() -> set[tuple[str, int]]:
    names = get_model_weights(DETECTOR)["DEFAULT"].meta["categories"]
    return {(name, number) for number, name in enumerate(names)}


def test_boxes_of_padded_images_are_cut_at_the_image(folder: Path) -> None:
    found = run(folder, preprocess={"sizes": "group", "pad": 32})
    images = pixels(folder)
    wanted = detected([functional.pad(image, [0, 0, *(-side % 32 for side in image.shape[:0:-1])]) for image in images])
    for want, image in zip(wanted, images, strict=True):
        height, width = image.shape[1:]
        inside = (want["boxes"][:, 0] <= width) & (want["boxes"][:, 1] <= height)
        want.update({key: value[inside] for key, value in want.items()})
        want["boxes"] = want["boxes"].minimum(torch.tensor([width, height] * 2))
    assert_same(found, wanted)


def test_boxes_of_resized_and_cropped_images_are_brought_back(folder: Path) -> None:
    found = run(folder, preprocess={"resize": 120, "crop": [110, 100]})
    wanted, images = [], pixels(folder)
    small = [functional.resize(image, 120, antialias=True) for image in images]
    for want, resized, image in zip(
        detected([functional.center_crop(one, [110, 100]) for one in small]), small, images, strict=True
    ):
        (height, width), (high, wide) = image.shape[1:], resized.shape[1:]
        cut = torch.tensor([round((wide - 100) / 2), round((high - 110) / 2)] * 2)
        boxes = (want["boxes"] + cut) / torch.tensor([wide / width, high / height] * 2)
        wanted.append({**want, "boxes": boxes})
    assert_same(found, wanted)


DETR = """
import torch

class Queries(torch.nn.Module):
    # One box around the bright square, one of no object.
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
def test_boxes_of_queries_are_where_the_image_has_them(preprocess: Row, tmp_path: Path) -> None:
    images, base = tmp_path / "images", tmp_path / "job"
    images.mkdir()
    base.mkdir()
    (base / "net.py").write_text(DETR)
    for name, size in zip(IMAGES, [(120, 160), (200, 150), (150, 150)], strict=True):
        image = Image.new("RGB", size)
        image.paste((255, 255, 255), (60, 50, 90, 100))
        image.save(images / name, "PNG")
    found = run(
        images,
        base,
        model={"type": "python", "target": "net:build"},
        preprocess={"mean": None, "std": None, **preprocess},
        task={"type": "detection", "threshold": 0.5, "labels": ["cat", "dog"]},
    )
    for name in IMAGES:
        (row,) = found[name]
        assert (row["label_id"], row["label"]) == (1, "dog")
        assert [row[key] for key in ("x_min", "y_min", "x_max", "y_max")] == pytest.approx([60, 50, 90, 100], abs=1.6)


def test_a_detector_brings_its_labels_and_leaves_all_preprocessing_to_itself() -> None:
    made = TorchvisionModel(name="ssdlite320_mobilenet_v3_large", seed=0).load(READER, Path())
    assert (made.input_kind, made.labels and made.labels[1]) == ("list", "person")
    given = Preprocess(resize=None, crop=None, mean=None, std=None)
    assert made.preprocess == given
    assert not any(part.training for part in made.module.modules())


def test_weights_of_ones_own_make_a_detector_by_name(tmp_path: Path) -> None:
    net = get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=4).eval()
    torch.save(net.state_dict(), tmp_path / "own.pt")
    place = str(tmp_path / "own.pt")
    named = TorchvisionModel(name="ssdlite320_mobilenet_v3_large", weights=place, num_classes=4).load(READER, Path())
    built = CheckpointModel(architecture="ssdlite320_mobilenet_v3_large", weights=place, num_classes=4)
    for made in (named, built.load(READER, Path())):
        assert (made.input_kind, made.labels) == ("list", None)
        images = [torch.rand(3, 64, 80), torch.rand(3, 90, 60)]
        with torch.inference_mode():
            for one, other in zip(made.module(list(images)), net(list(images)), strict=True):
                torch.testing.assert_close(one, other)


def test_a_published_file_is_built_as_torchvision_builds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member = get_model_weights("ssdlite320_mobilenet_v3_large")["COCO_V1"]
    file = tmp_path / "checkpoints" / member.url.rsplit("/", 1)[1]
    file.parent.mkdir()
    fresh = get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None)
    torch.save(fresh.state_dict(), file)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    theirs = get_model("ssdlite320_mobilenet_v3_large", weights=member).eval()
    ours = TorchvisionModel(name="ssdlite320_mobilenet_v3_large", weights=str(file)).load(READER, Path())
    images = [torch.rand(3, 64, 80)]
    with torch.inference_mode():
        torch.testing.assert_close(ours.module(list(images)), theirs(list(images)))
    assert ours.labels == tuple(member.meta["categories"])


# ------------------------------------------------------------------------------------------------- outputs to rows


def rows(post: Postprocess, output: Any, frames: list[ImageGeometry] | None = None) -> list[list[Row] | None]:
    tensors = {name: tensor.cpu() for name, tensor in post.on_device(output).items()}
    images = len(tensors["finite"])
    assert {len(tensor) for tensor in tensors.values()} == {images}
    (column,) = post.columns(tensors, frames or [ImageGeometry(1000, 1000, 1000, 1000)] * images)
    column.validate(full=True)
    assert [column.type] == [field.type for field in post.fields]
    found: list[list[Row] | None] = column.to_pylist()
    return found


def image(boxes: int, seed: int = 0, classes: int = 3) -> dict[str, torch.Tensor]:
    """One image's boxes, which overlap a lot, in no order."""
    own = torch.Generator().manual_seed(seed)
    corner = torch.rand(boxes, 2, generator=own) * 100
    size = torch.rand(boxes, 2, generator=own) * 100 + 50
    return {
        "boxes": torch.cat([corner, corner + size], 1),
        "labels": torch.randint(0, classes, (boxes,), generator=own),
        "scores": torch.rand(boxes, generator=own),
    }


def prepared(output: Any, own: tuple[str, ...] | None = None, **settings: Any) -> Postprocess:
    return DetectionTask(**settings).build_postprocess(output, own, READER, Path())


def test_the_column_is_what_the_readme_says() -> None:
    floats = {name: pa.float32() for name in ("score", "x_min", "y_min", "x_max", "y_max")}
    struct = pa.struct([("label_id", pa.int32()), ("label", pa.string()), *floats.items()])
    assert prepared([image(3), image(0)]).fields == [pa.field("detections", pa.list_(struct))]


def test_threshold_and_most_boxes_leave_the_best() -> None:
    output = [image(40), image(2, 1), image(0)]
    found = rows(prepared(output[:2], threshold=0.3, max_boxes=5), output)
    for own, want in zip(found, output, strict=True):
        scores = sorted((score for score in want["scores"].tolist() if score >= 0.3), reverse=True)[:5]
        assert own is not None
        assert [row["score"] for row in own] == scores
    assert found[2] == []


@pytest.mark.parametrize("nms", [0.2, 0.5])
def test_suppression_is_torchvisions(nms: float) -> None:
    output = [image(40), image(30, 1)]
    found = rows(prepared(output, threshold=0.1, nms=nms), output)
    for own, want in zip(found, output, strict=True):
        alive = want["scores"] >= 0.1
        boxes, scores, labels = want["boxes"][alive], want["scores"][alive], want["labels"][alive]
        kept = batched_nms(boxes, scores, labels, nms)
        assert own is not None
        assert 0 < len(own) == len(kept) < len(scores)
        assert [row["score"] for row in own] == scores[kept].tolist()
        assert [[row["x_min"], row["y_min"], row["x_max"], row["y_max"]] for row in own] == boxes[kept].tolist()


def queries(classes: int, images: int = 2, number: int = 20) -> dict[str, torch.Tensor]:
    own = torch.Generator().manual_seed(classes)
    boxes = torch.rand(images, number, 4, generator=own) * 0.3 + 0.2
    return {"logits": torch.randn(images, number, classes, generator=own) * 3, "pred_boxes": boxes}


@pytest.mark.parametrize("own", [None, ("a", "b", "c")], ids=["unknown labels", "one label less"])
def test_softmax_leaves_the_last_class_out(own: tuple[str, ...] | None) -> None:
    output = queries(4)
    found = rows(prepared(output, own, threshold=0.5), output, [ImageGeometry(400, 200, 400, 200)] * 2)
    scores, labels = output["logits"].softmax(2)[..., :-1].max(2)
    for index, some in enumerate(found):
        assert some is not None
        order = [place for place in scores[index].argsort(descending=True).tolist() if scores[index, place] >= 0.5]
        assert [row["label_id"] for row in some] == labels[index, order].tolist()
        assert [row["score"] for row in some] == pytest.approx(scores[index, order].tolist())
        assert {row["label"] for row in some} <= ({None} if own is None else set(own))
        boxes = box_convert(output["pred_boxes"][index, order], "cxcywh", "xyxy") * torch.tensor([400, 200, 400, 200])
        ours = torch.tensor([[row["x_min"], row["y_min"], row["x_max"], row["y_max"]] for row in some])
        torch.testing.assert_close(ours, boxes.clamp(min=0).minimum(torch.tensor([400, 200, 400, 200])))


def test_as_many_labels_as_logits_mean_a_score_for_each_class() -> None:
    output = queries(4)
    found = rows(prepared(output, tuple("abcd"), threshold=0.5), output)
    unnamed = rows(prepared(output, scores="sigmoid", threshold=0.5), output)
    for index, some in enumerate(found):
        assert unnamed[index] == [{**row, "label": None} for row in some or ()]
        scores = output["logits"][index].sigmoid().flatten().sort(descending=True).values
        assert some is not None
        assert [row["score"] for row in some] == pytest.approx([score for score in scores.tolist() if score >= 0.5])


@pytest.mark.filterwarnings("ignore::Warning")  # of what transformers imports
@pytest.mark.parametrize("family", ["detr", "rt_detr", "deformable_detr"])
def test_queries_are_read_as_transformers_reads_them(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    shown = {"detr": "Detr", "rt_detr": "RTDetr", "deformable_detr": "DeformableDetr"}[family]
    processor = getattr(transformers, f"{shown}ImageProcessor")()
    kind = getattr(
        __import__(f"transformers.models.{family}.modeling_{family}", fromlist=["_"]), f"{shown}ObjectDetectionOutput"
    )
    classes = 5 if family == "detr" else 4
    more = {} if family == "detr" else {"init_reference_points": torch.zeros(2, 120, 4)}
    output = kind(**queries(classes, number=120), **more)
    wanted = processor.post_process_object_detection(output, threshold=0.4, target_sizes=[(300, 500)] * 2)
    found = rows(prepared(output, threshold=0.4), output, [ImageGeometry(500, 300, 640, 480, 640 / 500, 480 / 300)] * 2)
    for some, want in zip(found, wanted, strict=True):
        assert some is not None
        assert len(some) == min(len(want["scores"]), 100) > 0
        for row, place in zip(some, want["scores"].argsort(descending=True).tolist()[:100], strict=True):
            assert (row["score"], row["label_id"]) == (
                pytest.approx(float(want["scores"][place])),
                want["labels"][place],
            )
            corners = want["boxes"][place].clamp(min=0).minimum(torch.tensor([500, 300, 500, 300]))
            assert [row[key] for key in ("x_min", "y_min", "x_max", "y_max")] == pytest.approx(
                corners.tolist(), abs=1e-3
            )


def test_labels_beyond_those_that_are_named_are_null() -> None:
    output = [image(30), image(30, 1)]
    found = rows(prepared(output, labels=["zero", "one"]), output)
    assert found[0] is not None
    assert {(row["label_id"], row["label"]) for row in found[0]} == {(0, "zero"), (1, "one"), (2, None)}


def test_labels_that_are_not_as_many_as_the_logits_are_refused() -> None:
    with pytest.raises(InvalidJob, match=r"task\.labels has 2 labels, but the model gives 4 classes"):
        prepared(queries(5), labels=["a", "b"])


def poisoned() -> list[list[dict[str, torch.Tensor]]]:
    in_scores, in_boxes = image(4), image(4)
    in_scores["scores"][2] = NAN
    in_boxes["boxes"][1, 3] = float("inf")
    return [[image(3), in_scores], [image(3), in_boxes]]


@pytest.mark.parametrize("output", poisoned(), ids=["scores", "boxes"])
def test_what_is_not_finite_is_a_fault_or_left_out(output: Any) -> None:
    post = prepared([image(3), image(3)], threshold=0)
    first, second = rows(post, output)
    assert first is not None
    assert (len(first), second) == (3, None)
    said = post.find_errors(post.on_device(output))
    assert [fault and fault.type for fault in said] == [None, "not_finite"]
    lenient = prepared([image(3), image(3)], threshold=0, allow_nan=True)
    rest = rows(lenient, output)[1]
    assert rest is not None
    assert len(rest) == 3
    assert lenient.find_errors(lenient.on_device(output)) == [None, None]


def test_queries_that_are_not_finite_are_a_fault() -> None:
    output = queries(4)
    output["logits"][1, 3, 0] = NAN
    post = prepared(queries(4), threshold=0)
    assert [found is None for found in rows(post, output)] == [False, True]


@pytest.mark.parametrize(
    ("output", "settings", "said"),
    [
        (torch.zeros(2, 5), {}, "gives float32 [2, 5] for a batch of 2"),
        (({}, [image(1), image(1)]), {}, "a tuple of 2"),
        ([image(1)], {}, "a list of 1, the first a dict with the keys boxes, labels, scores"),
        (
            [{"boxes": torch.zeros(1, 4)}] * 2,
            {},
            "a list of 2, the first a dict with the keys boxes (boxes float32 [1, 4])",
        ),
        ([{**image(2), "labels": torch.zeros(3)}] * 2, {}, "labels float32 [3]"),
        ([{**image(2), "boxes": torch.zeros(2, 5)}] * 2, {}, "boxes float32 [2, 5]"),
        ({"logits": torch.zeros(2, 7, 4)}, {}, "a dict with the keys logits (logits float32 [2, 7, 4])"),
        ({"logits": torch.zeros(2, 7, 4), "pred_boxes": torch.zeros(2, 6, 4)}, {}, "pred_boxes float32 [2, 6, 4]"),
        (queries(4, images=3), {}, "logits float32 [3, 20, 4]"),
        (queries(4), {"format": "torchvision"}, "a list with a dict for each image"),
        ([image(1), image(1)], {"format": "detr"}, "logits [n, q, classes]"),
        (None, {}, "gives None"),
    ],
)
def test_other_outputs_are_refused_with_their_shapes(output: Any, settings: Row, said: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        prepared(output, **settings)
    assert said in caught.value.message
    assert "detection wants" in caught.value.message
    assert "model.type: python" in caught.value.message


def test_a_single_logit_is_a_score() -> None:
    output = queries(1)
    (first, _) = rows(prepared(output, threshold=0), output)
    assert first is not None
    assert [row["score"] for row in first] == pytest.approx(
        output["logits"][0, :, 0].sigmoid().sort(descending=True).values.tolist()
    )


def test_softmax_over_one_class_is_refused() -> None:
    with pytest.raises(InvalidJob, match=r"task\.scores: softmax .* write sigmoid"):
        prepared(queries(1), scores="softmax")


@pytest.mark.parametrize("settings", [{"threshold": 2}, {"nms": -1}, {"max_boxes": 0}, {"format": "yolo"}])
def test_settings_out_of_range_are_refused(settings: Row) -> None:
    with pytest.raises(ValidationError):
        DetectionTask(**settings)


def test_a_row_has_a_bound() -> None:
    task = DetectionTask(threshold=0, max_boxes=30, labels=["a", "bb", "ccc"])
    output = [image(50), image(50, 1)]
    post = task.build_postprocess(output, None, READER, Path())
    (column,) = post.columns(post.on_device(output), [ImageGeometry(1000, 1000, 1000, 1000)] * 2)
    assert column.nbytes / 2 <= task.row_bytes


def test_boxes_wholly_in_the_padding_are_left_out_and_others_cut() -> None:
    one = {
        "boxes": torch.tensor([[90.0, 10, 120, 40], [101, 10, 120, 40], [-5, -5, 30, 20]]),
        "labels": torch.zeros(3, dtype=torch.long),
        "scores": torch.tensor([0.9, 0.8, 0.7]),
    }
    (found, _) = rows(
        prepared([one, one]), [one, one], [ImageGeometry(100, 50, 100, 50, pad_right=28, pad_below=14)] * 2
    )
    assert found is not None
    corners = [[row["x_min"], row["y_min"], row["x_max"], row["y_max"]] for row in found]
    assert corners == [[90, 10, 100, 40], [0, 0, 30, 20]]
