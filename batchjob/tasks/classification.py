"""`type: classification`: the k most likely classes, with their names and scores."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from batchjob.errors import InvalidJob
from batchjob.settings import Decision
from batchjob.tasks.activation import Activation, ScoreFunction, apply_activation, decide_activation
from batchjob.tasks.ground_truth import UNKNOWN_CLASS, LabelIndex, is_class_type, ratio
from batchjob.tasks.labels import CLASS_FIELDS, Labels, look_up_labels, max_label_bytes, resolve_class_names
from batchjob.tasks.list_columns import build_struct_lists
from batchjob.tasks.model_output import count_classes
from batchjob.tasks.postprocess import Postprocess
from batchjob.tasks.settings import RunModel, TaskContext, TaskModel, TaskSettings

if TYPE_CHECKING:
    import torch

    from batchjob.preprocessing.geometry import ImageGeometry

__all__ = ["ClassificationTask"]

_CLASS_BYTES = 12  # 4 each for the id, the score and the offset of the label
_EXPECTED = "classification wants [n, classes]: a row of logits for each image"
_ADVICE = "wrap the model so that it returns its logits (model.type: python), or use another task"
# The sums are written to the footer of every part, so they must stay few: pairs of classes up to the first number of
# classes, counts by class up to the second, neither above it.
_MAX_CONFUSION_CLASSES = 100
_MAX_COUNTED_CLASSES = 2_000


class ClassificationTask(TaskSettings):
    """The class that an image shows.

    Attributes:
        top_k: Number of classes in a row, the most likely first.
        labels: Class names by id, as a list, or a file of one a line, a JSON list, or a JSON object `id: label`. If not
            given, the names that the weights bring; null if they bring none.
        truth: Passthrough column with the true label or its id; `report.json` then has the accuracy. Rows where it is
            null, or names no class of the model, do not count.
        activation: Function from the model's output to scores: `softmax`, `sigmoid` (each class for itself), or `none`
            for a model whose output are scores already. `auto` looks at the model; the plan keeps what was found.
        allow_nan: True accepts rows whose scores are NaN; their `score` is NaN and they name no class.
    """

    argmax_is_class: ClassVar[bool] = True

    type: Literal["classification"] = "classification"
    top_k: int = Field(default=1, ge=1)
    labels: Labels = None
    truth: str | None = Field(default=None, min_length=1)
    activation: Activation = "auto"
    allow_nan: bool = False

    @property
    def row_bytes(self) -> int:
        """Upper bound of the bytes of a row's columns."""
        return (self.top_k + 1) * (_CLASS_BYTES + max_label_bytes(self.labels)) + 8

    def decide(self, model: TaskModel, run_model: RunModel) -> dict[str, Decision]:
        """Choose the activation, if it is `auto`. Raises InvalidJob if the model gives features."""
        return decide_activation(self.activation, model, run_model, "softmax")

    def build_postprocess(self, output: Any, context: TaskContext) -> Postprocess:
        """Build the postprocess; see `TaskSettings`. The output must be `[n, classes]`, with two classes or more."""
        classes = count_classes(output, self.top_k, _EXPECTED, _ADVICE)
        if classes == 1:
            raise InvalidJob(
                f"the model gives {list(output.shape)} for {len(output)} images: softmax over 1 class says nothing; "
                "wrap it to give a logit for each class (model.type: python)"
            )
        return _ClassificationPostprocess(
            top_k=self.top_k,
            activation="softmax" if self.activation == "auto" else self.activation,
            label_index=LabelIndex(classes, resolve_class_names(self.labels, classes, context)),
            allow_nan=self.allow_nan,
            truth_columns=self.truth_columns,
        )

    def compute_metrics(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """Compute `accuracy`, `top_<k>_accuracy` and `confusion` as {truth: {predicted: images}}.

        `images` is the number of images that count. `unknown_truth` is the number of images whose truth names no class
        of the model; most are spelling mistakes, so they are reported beside the accuracy and not counted in it. Above
        100 classes the report has `classes` as {truth: {images, right}} in place of `confusion`; above 2,000 classes,
        neither. A rate over no images is None.
        """
        if self.truth is None:
            return {}
        images = sums.get("images", 0)
        metrics: dict[str, Any] = {"truth": self.truth, "images": images, "unknown_truth": sums.get("unknown_truth", 0)}
        metrics["accuracy"] = ratio(sums.get("right", 0), images)
        if self.top_k > 1:
            metrics[f"top_{self.top_k}_accuracy"] = ratio(sums.get("right_in_top_k", 0), images)
        return metrics | _build_class_tables(sums)

    def _expected_truth_type(self, data_type: pa.DataType) -> str | None:
        return None if is_class_type(data_type) else "labels (text) or ids (whole numbers)"


@dataclass(frozen=True)
class _ClassificationPostprocess(Postprocess):
    top_k: int
    activation: ScoreFunction
    label_index: LabelIndex
    allow_nan: bool
    truth_columns: tuple[str, ...] = ()

    @property
    def fields(self) -> list[pa.Field]:
        return [*CLASS_FIELDS, pa.field("top_k", pa.list_(pa.struct(CLASS_FIELDS)))]

    def on_device(self, output: torch.Tensor) -> dict[str, torch.Tensor]:
        """Reduce an output to `label_id` int32 and `score` float32 `[n, k]`, the best first, and `finite` bool `[n]`.

        In a softmax a logit of minus infinity rules out a class and is no error; NaN and plus infinity turn a whole row
        into NaN.
        """
        import torch

        scores, ids = apply_activation(output, self.activation).topk(self.top_k, dim=1)
        return {"label_id": ids.to(torch.int32), "score": scores, "finite": scores.isfinite().all(dim=1)}

    def columns(self, tensors: dict[str, torch.Tensor], geometries: Sequence[ImageGeometry]) -> list[pa.Array]:  # noqa: ARG002
        labels, finite = self.label_index.labels, tensors["finite"].numpy()
        ids, scores = tensors["label_id"].numpy(), tensors["score"].numpy()
        best_ids = pa.array(ids[:, 0], mask=~finite)
        best_scores = pa.array(scores[:, 0], mask=self.null_rows(tensors))
        flat_ids, flat_scores = pa.array(ids[finite].reshape(-1)), pa.array(scores[finite].reshape(-1))
        flat_columns = [flat_ids, look_up_labels(labels, flat_ids), flat_scores]
        top_k = build_struct_lists(finite * self.top_k, flat_columns, CLASS_FIELDS, ~finite)
        return [best_ids, look_up_labels(labels, best_ids), best_scores, top_k]

    def sum_metrics(self, rows: pa.RecordBatch) -> dict[str, float]:
        """Count `images`, `right`, `right_in_top_k` and `unknown_truth`, and images by label under JSON lists as keys.

        Example: `["cat","dog"]` counts cats predicted as dogs, and `["cat",""]` cats predicted as nothing, because
        `allow_nan` accepted NaN. With many classes, `["cat"]` counts all cats and `["cat",1]` those recognised.
        """
        rows = rows.filter(pc.is_valid(rows.column(self.truth_columns[0])))
        truth = self.label_index.class_ids(rows.column(self.truth_columns[0]))
        known = truth != UNKNOWN_CLASS
        predicted = self.label_index.canonical_ids(rows.column("label_id"))[known]
        sums = Counter({"unknown_truth": int((~known).sum()), "images": int(known.sum())})
        sums["right"] = int((predicted == truth[known]).sum())
        sums["right_in_top_k"] = self._count_top_k_hits(rows.column("top_k"), truth)
        sums.update(self._count_by_class(truth[known], predicted))
        return {key: count for key, count in sums.items() if count}

    def _count_top_k_hits(self, top_k: pa.Array, truth: np.ndarray[Any, Any]) -> int:
        row = pc.list_parent_indices(top_k).to_numpy()
        ids = self.label_index.canonical_ids(pc.list_flatten(top_k).field("label_id"))
        # unique: two listed classes with the same label are one hit.
        return len(np.unique(row[(ids == truth[row]) & (ids != UNKNOWN_CLASS)]))

    def _count_by_class(self, truth: np.ndarray[Any, Any], predicted: np.ndarray[Any, Any]) -> Counter[str]:
        class_name = self.label_index.class_name
        sums: Counter[str] = Counter()
        for (right, guess), count in Counter(zip(truth.tolist(), predicted.tolist(), strict=True)).items():
            if self.label_index.count <= _MAX_CONFUSION_CLASSES:
                sums[_json_key(class_name(right), class_name(guess) if guess != UNKNOWN_CLASS else "")] += count
            elif self.label_index.count <= _MAX_COUNTED_CLASSES:
                sums[_json_key(class_name(right))] += count
                sums[_json_key(class_name(right), 1)] += count * (right == guess)
        return sums


def _json_key(*parts: str | int) -> str:
    return json.dumps(parts, ensure_ascii=False, separators=(",", ":"))


def _build_class_tables(sums: Mapping[str, float]) -> dict[str, Any]:
    """Build `confusion` or `classes` from the sums whose keys are JSON lists."""
    confusion: dict[str, dict[str, float]] = {}
    classes: dict[str, dict[str, float]] = {}
    for key, count in sorted(sums.items(), key=lambda item: (-item[1], item[0])):
        match json.loads(key) if key.startswith("[") else None:
            case [truth, str(predicted)]:
                confusion.setdefault(truth, {})[predicted] = count
            case [truth]:
                classes.setdefault(truth, {"images": 0, "right": 0})["images"] = count
            case [truth, _]:
                classes.setdefault(truth, {"images": 0, "right": 0})["right"] = count
    tables = {"confusion": confusion, "classes": classes}
    return {name: dict(sorted(table.items())) for name, table in tables.items() if table}
