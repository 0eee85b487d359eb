"""`type: classification`: logits to the k likeliest classes, with their names and softmax scores."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from batchjob.errors import InvalidJob
from batchjob.preprocessing.geometry import ImageGeometry
from batchjob.tasks.ground_truth import UNKNOWN_CLASS, LabelIndex, is_class_type, ratio
from batchjob.tasks.labels import Labels, max_label_bytes, read_labels, resolve_class_names
from batchjob.tasks.postprocess import Postprocess, finite_mask, nonfinite_errors, require_float_output
from batchjob.tasks.settings import TaskSettings
from batchjob.types import ErrorRecord

if TYPE_CHECKING:
    import numpy as np
    import torch

    from batchjob.storage.reader import Reader

__all__ = ["ClassificationTask"]

_CLASS_FIELDS = [pa.field("label_id", pa.int32()), pa.field("label", pa.string()), pa.field("score", pa.float32())]
_FIELDS = [*_CLASS_FIELDS, pa.field("top_k", pa.list_(pa.struct(_CLASS_FIELDS)))]
_WANTED = "classification wants [n, classes]: a row of logits for each image"
_ADVICE = "wrap the model so that it returns its logits (model.type: python), or use another task"
# The sums lie in every part's footer, so they are few: pairs of classes up to so many, then counts by class, then none.
_CONFUSED_AT_MOST = 100
_COUNTED_AT_MOST = 2_000


class ClassificationTask(TaskSettings):
    """Which class an image shows.

    Attributes:
        top_k: classes a row lists, the likeliest first.
        labels: names by id, as a list, or a file of one a line, a JSON list, or a JSON object `id: label`. The
            weights' own names where not given; null where they have none either.
        truth: the passthrough column that holds the right label, or its id; `report.json` then tells the accuracy.
            Rows where it is null, or names no class of the model, do not count.
        allow_nan: True lets rows pass whose scores are NaN; their `score` is NaN and they name no class.
    """

    argmax_is_class: ClassVar[bool] = True

    type: Literal["classification"] = "classification"
    top_k: int = Field(default=1, ge=1)
    labels: Labels = None
    truth: str | None = Field(default=None, min_length=1)
    allow_nan: bool = False

    @property
    def row_bytes(self) -> int:
        """A bound on the bytes that a row's columns take."""
        return (self.top_k + 1) * (12 + max_label_bytes(self.labels)) + 8

    @property
    def truth_columns(self) -> tuple[str, ...]:
        """The column that holds the right class."""
        return () if self.truth is None else (self.truth,)

    def check(self, reader: Reader, base: Path) -> None:  # noqa: ARG002 - one face for all tasks
        """Reads the label file, if there is one, without torch. Raises InvalidJob, Unavailable."""
        if isinstance(self.labels, str):
            read_labels(reader, self.labels)

    def build_postprocess(self, output: Any, labels: tuple[str, ...] | None, reader: Reader, base: Path) -> Postprocess:  # noqa: ARG002
        """Looks at one output before work starts.

        Args:
            output: what the model gave for `EXAMPLE_ROWS` images.
            labels: what the weights bring.
            reader: for a label file.
            base: of no use here.

        Raises:
            InvalidJob: the output is not `[n, classes]`, labels do not fit it, or `top_k` is more than it has.
            Unavailable: the store of the label file cannot be reached.
        """
        logits = require_float_output(output, _WANTED, _ADVICE)
        if logits.ndim != 2:
            raise InvalidJob(f"the model gives {list(logits.shape)} for {len(logits)} images, but {_WANTED}; {_ADVICE}")
        classes = logits.shape[1]
        if classes < 2:
            raise InvalidJob(
                f"the model gives {list(logits.shape)} for {len(logits)} images: softmax over {classes} class says "
                "nothing; wrap it to give a logit for each class (model.type: python)"
            )
        if self.top_k > classes:
            raise InvalidJob(f"task.top_k is {self.top_k}, but the model knows {classes} classes; lower it")
        names = resolve_class_names(self.labels, classes, labels, reader)
        return _ClassificationPostprocess(self.top_k, LabelIndex(classes, names), self.allow_nan, self.truth_columns)

    def compute_metrics(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """`images`, `unknown_truth`, `accuracy`, `top_<k>_accuracy`, and `confusion` as {truth: {predicted: images}}.

        `images` are those that count. `unknown_truth` are those whose truth names no class of the model: most often a
        matter of spelling, so they are told beside the accuracy, not mixed into it. Above 100 classes, `classes` as
        {truth: {images, right}} stands in place of the confusion; above 2,000, neither. A rate over no images is None.
        """
        if self.truth is None:
            return {}
        images = sums.get("images", 0)
        told: dict[str, Any] = {"truth": self.truth, "images": images, "unknown_truth": sums.get("unknown_truth", 0)}
        told["accuracy"] = ratio(sums.get("right", 0), images)
        if self.top_k > 1:
            told[f"top_{self.top_k}_accuracy"] = ratio(sums.get("right_in_top_k", 0), images)
        return told | _by_class(sums)

    def _expected_truth_type(self, kind: pa.DataType) -> str | None:
        return None if is_class_type(kind) else "labels (text) or ids (whole numbers)"


def _by_class(sums: Mapping[str, float]) -> dict[str, Any]:
    """`confusion` or `classes`, from what `_TopK.tally` wrote under keys that are JSON lists."""
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


@dataclass(frozen=True)
class _ClassificationPostprocess:
    top_k: int
    classes: LabelIndex
    allow_nan: bool
    truth_columns: tuple[str, ...] = ()

    @property
    def fields(self) -> list[pa.Field]:
        return list(_FIELDS)

    def on_device(self, output: torch.Tensor) -> dict[str, torch.Tensor]:
        """`label_id` int32 and `score` float32 `[n, k]`, the highest first; `finite` bool `[n]`.

        A logit of minus infinity rules a class out and is no fault; NaN and plus infinity make a whole row NaN.
        """
        import torch

        scores, ids = output.float().softmax(dim=1).topk(self.top_k, dim=1)
        return {"label_id": ids.to(torch.int32), "score": scores, "finite": scores.isfinite().all(dim=1)}

    def columns(self, tensors: dict[str, torch.Tensor], geometries: Sequence[ImageGeometry]) -> list[pa.Array]:  # noqa: ARG002
        good = finite_mask(tensors)
        ids, scores = tensors["label_id"].numpy(), tensors["score"].numpy()
        first = pa.array(ids[:, 0], mask=~good)
        best = pa.array(scores[:, 0]) if self.allow_nan else pa.array(scores[:, 0], mask=~good)
        return [first, self._named(first), best, self._lists(ids[good], scores[good], good)]

    def find_errors(self, tensors: dict[str, torch.Tensor]) -> list[ErrorRecord | None]:
        return nonfinite_errors(tensors, self.allow_nan)

    def sum_metrics(self, rows: pa.RecordBatch) -> dict[str, float]:
        """`images`, `right`, `right_in_top_k`, `unknown_truth`, and counts by label, under JSON lists as keys.

        `["cat","dog"]` are cats taken for dogs, and `["cat",""]` for nothing, NaN being let pass. Where there are many
        classes `["cat"]` are cats, and `["cat",1]` those that were seen.
        """
        rows = rows.filter(pc.is_valid(rows.column(self.truth_columns[0])))
        right = self.classes.class_ids(rows.column(self.truth_columns[0]))
        known = right != UNKNOWN_CLASS
        predicted = self.classes.canonical_ids(rows.column("label_id"))[known]
        sums = Counter({"unknown_truth": int((~known).sum()), "images": int(known.sum())})
        sums["right"] = int((predicted == right[known]).sum())
        sums["right_in_top_k"] = self._hits(rows.column("top_k"), right)
        sums.update(self._pairs(right[known], predicted))
        return {key: count for key, count in sums.items() if count}

    def _hits(self, listed: pa.Array, right: np.ndarray[Any, Any]) -> int:
        """Rows whose list holds what is right."""
        import numpy as np

        row = pc.list_parent_indices(listed).to_numpy()
        found = self.classes.canonical_ids(pc.list_flatten(listed).field("label_id"))
        return len(np.unique(row[(found == right[row]) & (found != UNKNOWN_CLASS)]))

    def _pairs(self, right: np.ndarray[Any, Any], predicted: np.ndarray[Any, Any]) -> Counter[str]:
        name = self.classes.class_name
        sums: Counter[str] = Counter()
        for (truth, found), count in Counter(zip(right.tolist(), predicted.tolist(), strict=True)).items():
            if self.classes.count <= _CONFUSED_AT_MOST:
                sums[_key(name(truth), name(found) if found != UNKNOWN_CLASS else "")] += count
            elif self.classes.count <= _COUNTED_AT_MOST:
                sums[_key(name(truth))] += count
                sums[_key(name(truth), 1)] += count * (truth == found)
        return sums

    def _named(self, ids: pa.Array) -> pa.Array:
        if self.classes.labels is None:
            return pa.nulls(len(ids), pa.string())
        return self._label_array.take(ids)

    @cached_property
    def _label_array(self) -> pa.Array:
        return pa.array(self.classes.labels, pa.string())

    def _lists(
        self, ids: np.ndarray[Any, Any], scores: np.ndarray[Any, Any], good: np.ndarray[Any, np.dtype[np.bool_]]
    ) -> pa.Array:
        import numpy as np

        flat = pa.array(ids.reshape(-1))
        listed = [flat, self._named(flat), pa.array(scores.reshape(-1))]
        classes = pa.StructArray.from_arrays(listed, fields=_CLASS_FIELDS)
        ends = np.zeros(len(good) + 1, np.int32)
        np.cumsum(good * self.top_k, out=ends[1:])
        return pa.ListArray.from_arrays(pa.array(ends), classes, type=_FIELDS[-1].type, mask=pa.array(~good))


def _key(*parts: str | int) -> str:
    return json.dumps(parts, ensure_ascii=False, separators=(",", ":"))
