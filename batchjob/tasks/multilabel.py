"""`type: multilabel`: all the classes that an image shows, by their scores and a threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from batchjob.arrow_types import is_list
from batchjob.errors import InvalidJob
from batchjob.settings import Decision
from batchjob.tasks.activation import Activation, ScoreFunction, apply_activation, decide_activation
from batchjob.tasks.ground_truth import UNKNOWN_CLASS, LabelIndex, as_text, is_class_type, ratio
from batchjob.tasks.labels import CLASS_FIELDS, Labels, look_up_labels, max_label_bytes, resolve_class_names
from batchjob.tasks.list_columns import build_struct_lists, build_vector_column
from batchjob.tasks.model_output import count_classes
from batchjob.tasks.postprocess import Postprocess
from batchjob.tasks.settings import RunModel, TaskContext, TaskModel, TaskSettings

if TYPE_CHECKING:
    import torch

    from batchjob.preprocessing.geometry import ImageGeometry

__all__ = ["MultilabelTask"]

_CLASS_BYTES = 12  # 4 each for the id, the score and the offset of the label
_TYPICAL_CLASSES = 100
_EXPECTED = "multilabel wants [n, classes]: a row of logits for each image"
_ADVICE = "wrap the model so that it returns its logits, before the sigmoid (model.type: python), or use another task"

Probability = Annotated[float, Field(ge=0, le=1)]


class MultilabelTask(TaskSettings):
    """The classes that an image shows: none, one or many.

    Attributes:
        threshold: Lowest score of a class that counts as shown; one for all classes, or one for each class by id.
        labels: Class names by id, as a list, or a file of one a line, a JSON list, or a JSON object `id: label`. If not
            given, the names that the weights bring; null if they bring none.
        top_k: Maximum number of classes in a row; if not given, all over the threshold.
        scores: True adds a column with the scores of all classes.
        truth: Passthrough column with the true labels or ids: a list, or text with `;` between them; `report.json` then
            has precision and recall. Rows where it is null, or names something that is no class of the model, do not
            count.
        activation: Function from the model's output to scores: `sigmoid`, `softmax`, or `none` for a model whose output
            are scores already. `auto` looks at the model; the plan keeps what was found.
        allow_nan: True accepts rows that hold NaN; such a score is over no threshold.
    """

    type: Literal["multilabel"] = "multilabel"
    threshold: Probability | tuple[Probability, ...] = 0.5
    labels: Labels = None
    top_k: int | None = Field(default=None, ge=1)
    scores: bool = False
    truth: str | None = Field(default=None, min_length=1)
    activation: Activation = "auto"
    allow_nan: bool = False

    @property
    def row_bytes(self) -> int:
        """Upper bound of the bytes of a row's columns; for a typical number of classes if the job does not say it."""
        known = [len(names) for names in (self.labels, self.threshold) if isinstance(names, tuple)]
        classes = known[0] if known else _TYPICAL_CLASSES
        listed = min(self.top_k or classes, classes) if known else self.top_k or classes
        return listed * (_CLASS_BYTES + max_label_bytes(self.labels)) + 8 + (4 * classes if self.scores else 0)

    def decide(self, model: TaskModel, run_model: RunModel) -> dict[str, Decision]:
        """Choose the activation, if it is `auto`. Raises InvalidJob if the model gives features."""
        return decide_activation(self.activation, model, run_model, "sigmoid")

    def build_postprocess(self, output: Any, context: TaskContext) -> Postprocess:
        """Build the postprocess; see `TaskSettings`. The output must be `[n, classes]`."""
        classes = count_classes(output, self.top_k, _EXPECTED, _ADVICE)
        if isinstance(self.threshold, tuple) and len(self.threshold) != classes:
            raise InvalidJob(
                f"task.threshold has {len(self.threshold)} thresholds, but the model gives {classes} classes; "
                "give one for each class, in the order of their ids, or one number for all"
            )
        return _MultilabelPostprocess(
            label_index=LabelIndex(classes, resolve_class_names(self.labels, classes, context)),
            threshold=self.threshold,
            activation="sigmoid" if self.activation == "auto" else self.activation,
            top_k=self.top_k or classes,
            scores=self.scores,
            allow_nan=self.allow_nan,
            truth_columns=self.truth_columns,
        )

    def compute_metrics(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """Compute `precision`, `recall` and `f1` over all classes together (micro averages), and `exact_match`.

        `images` is the number of images that count; `exact_match` is the share of them that list exactly the true
        classes; `unknown_truth` is the number whose truth names no class of the model. A rate over nothing is None.
        """
        if self.truth is None:
            return {}
        images, hits = sums.get("images", 0), sums.get("hits", 0)
        listed, right = sums.get("listed", 0), sums.get("right", 0)
        return {
            "truth": self.truth,
            "images": images,
            "unknown_truth": sums.get("unknown_truth", 0),
            "precision": ratio(hits, listed),
            "recall": ratio(hits, right),
            "f1": ratio(2 * hits, listed + right),
            "exact_match": ratio(sums.get("exact", 0), images),
        }

    def _expected_truth_type(self, data_type: pa.DataType) -> str | None:
        item_type = data_type.value_type if is_list(data_type) else data_type
        is_number = pa.types.is_integer(data_type) or pa.types.is_floating(data_type)
        if is_class_type(item_type) and (is_list(data_type) or not is_number):
            return None
        return "lists of labels or ids, or text with ';' between them"


@dataclass(frozen=True)
class _MultilabelPostprocess(Postprocess):
    label_index: LabelIndex
    threshold: float | tuple[float, ...]
    activation: ScoreFunction
    top_k: int
    scores: bool
    allow_nan: bool
    truth_columns: tuple[str, ...] = ()

    @property
    def fields(self) -> list[pa.Field]:
        labels = pa.field("labels", pa.list_(pa.struct(CLASS_FIELDS)))
        return [labels, pa.field("scores", pa.list_(pa.float32(), self.label_index.count))] if self.scores else [labels]

    def on_device(self, output: torch.Tensor) -> dict[str, torch.Tensor]:
        """Reduce an output to the k best classes: `label_id` int32 and `score` float32 `[n, k]`, the best first.

        `count` int32 `[n]` is the number of them over their threshold, `finite` bool `[n]`. If `scores` is set, it
        holds the scores of all classes by id, float32 `[n, classes]`.
        """
        import torch

        logits = output.float()
        scores = apply_activation(output, self.activation)
        limit = self.threshold
        shown = scores >= (torch.tensor(limit, device=scores.device) if isinstance(limit, tuple) else limit)
        # Sort by logits, because large ones all have the score 1. They are clamped, so that minus infinity is left to
        # the classes below their threshold.
        ranked = logits.clamp(min=torch.finfo(torch.float32).min).masked_fill(~shown, -torch.inf)
        ids = ranked.sort(dim=1, descending=True, stable=True).indices[:, : self.top_k]
        tensors = {
            "label_id": ids.to(torch.int32),
            "score": scores.gather(1, ids),
            "count": shown.sum(dim=1).clamp(max=self.top_k).to(torch.int32),
            "finite": ~scores.isnan().any(dim=1),
        }
        return tensors | {"scores": scores} if self.scores else tensors

    def columns(self, tensors: dict[str, torch.Tensor], geometries: Sequence[ImageGeometry]) -> list[pa.Array]:  # noqa: ARG002
        null_rows = self.null_rows(tensors)
        counts = np.where(null_rows, 0, tensors["count"].numpy())
        listed = np.arange(tensors["label_id"].shape[1]) < counts[:, None]
        ids = pa.array(tensors["label_id"].numpy()[listed])
        flat_columns = [ids, look_up_labels(self.label_index.labels, ids), pa.array(tensors["score"].numpy()[listed])]
        columns = [build_struct_lists(counts, flat_columns, CLASS_FIELDS, null_rows)]
        return [*columns, build_vector_column(tensors["scores"], null_rows)] if self.scores else columns

    def sum_metrics(self, rows: pa.RecordBatch) -> dict[str, float]:
        """Count `images`, `unknown_truth` and `exact`; over all classes `listed`, `right` and `hits`, their overlap.

        Example: truth {cat, dog} and prediction {cat} have 1 listed, 2 right, 1 hit, and no exact match.
        """
        rows = rows.filter(pc.is_valid(rows.column(self.truth_columns[0])))
        truth_rows, truth_ids = self._flatten_truth(rows.column(self.truth_columns[0]))
        counted = np.ones(rows.num_rows, np.bool_)
        counted[truth_rows[truth_ids == UNKNOWN_CLASS]] = False
        truth = self._encode_pairs(truth_rows, truth_ids, counted)
        labels = rows.column("labels")
        predicted_ids = self.label_index.canonical_ids(pc.list_flatten(labels).field("label_id"))
        predicted = self._encode_pairs(pc.list_parent_indices(labels).to_numpy(), predicted_ids, counted)
        differing_rows = np.setxor1d(truth, predicted, assume_unique=True) // self.label_index.count
        sums = {
            "images": int(counted.sum()),
            "unknown_truth": int((~counted).sum()),
            "exact": int(counted.sum()) - len(np.unique(differing_rows)),
            "listed": len(predicted),
            "right": len(truth),
            "hits": len(np.intersect1d(truth, predicted, assume_unique=True)),
        }
        return {key: count for key, count in sums.items() if count}

    def _flatten_truth(self, column: pa.Array) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return the row and the class id of each true class; text is split at `;`, its empty parts are ignored."""
        text = as_text(column)
        lists = column if text is None else pc.split_pattern(text, ";")
        row, values = pc.list_parent_indices(lists), pc.list_flatten(lists)
        if text is not None:
            not_empty = pc.not_equal(pc.utf8_trim_whitespace(values), "")
            row, values = row.filter(not_empty), values.filter(not_empty)
        return row.to_numpy(), self.label_index.class_ids(values)

    def _encode_pairs(
        self, row: np.ndarray[Any, Any], ids: np.ndarray[Any, Any], counted: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return each (row, class id) pair of the counted rows once, as `row * classes + id`, sorted.

        Example: with 3 classes, row 2 and class 1 are 7; 7 // 3 is the row again.
        """
        selected = counted[row]
        return np.unique(row[selected].astype(np.int64) * self.label_index.count + ids[selected])
