"""`type: multilabel`: logits to all the classes an image shows, by a sigmoid and a threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from batchjob.errors import InvalidJob
from batchjob.preprocessing.geometry import ImageGeometry
from batchjob.tasks.ground_truth import UNKNOWN_CLASS, LabelIndex, as_text, is_class_type, ratio
from batchjob.tasks.labels import Labels, max_label_bytes, read_labels, resolve_class_names
from batchjob.tasks.postprocess import Postprocess, finite_mask, nonfinite_errors, require_float_output
from batchjob.tasks.settings import TaskSettings
from batchjob.types import ErrorRecord

if TYPE_CHECKING:
    import numpy as np
    import torch

    from batchjob.storage.reader import Reader

__all__ = ["MultilabelTask"]

_USUAL_CLASSES = 100
_CLASS_FIELDS = [pa.field("label_id", pa.int32()), pa.field("label", pa.string()), pa.field("score", pa.float32())]
_LISTS = pa.list_(pa.struct(_CLASS_FIELDS))
_WANTED = "multilabel wants [n, classes]: a row of logits for each image"
_ADVICE = "wrap the model so that it returns its logits, before the sigmoid (model.type: python), or use another task"
Probability = Annotated[float, Field(ge=0, le=1)]


class MultilabelTask(TaskSettings):
    """Which classes an image shows: none, one or many.

    Attributes:
        threshold: the score from which on a class counts as shown; one for all, or one for each class by id.
        labels: names by id, as a list, or a file of one a line, a JSON list, or a JSON object `id: label`. The
            weights' own names where not given; null where they have none either.
        top_k: classes a row lists at most; all over the threshold where not given.
        scores: True adds a column with the scores of all classes.
        truth: the passthrough column that holds the right labels or ids: a list, or text with `;` between them;
            `report.json` then tells precision and recall. Rows where it is null, or names something that is no class
            of the model, do not count.
        allow_nan: True lets rows pass that hold NaN; such a score is over no threshold.
    """

    type: Literal["multilabel"] = "multilabel"
    threshold: Probability | tuple[Probability, ...] = 0.5
    labels: Labels = None
    top_k: int | None = Field(default=None, ge=1)
    scores: bool = False
    truth: str | None = Field(default=None, min_length=1)
    allow_nan: bool = False

    @property
    def row_bytes(self) -> int:
        """A bound on the bytes that a row's columns take; where nothing tells the number of classes, a usual one."""
        known = [len(given) for given in (self.labels, self.threshold) if isinstance(given, tuple)]
        classes = known[0] if known else _USUAL_CLASSES
        listed = min(self.top_k or classes, classes) if known else self.top_k or classes
        return listed * (12 + max_label_bytes(self.labels)) + 8 + (4 * classes if self.scores else 0)

    @property
    def truth_columns(self) -> tuple[str, ...]:
        """The column that holds the right classes."""
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
            InvalidJob: the output is not `[n, classes]`, or labels or thresholds are not as many as the classes.
            Unavailable: the store of the label file cannot be reached.
        """
        logits = require_float_output(output, _WANTED, _ADVICE)
        if logits.ndim != 2 or not logits.shape[1]:
            raise InvalidJob(f"the model gives {list(logits.shape)} for {len(logits)} images, but {_WANTED}; {_ADVICE}")
        classes = logits.shape[1]
        if isinstance(self.threshold, tuple) and len(self.threshold) != classes:
            raise InvalidJob(
                f"task.threshold has {len(self.threshold)} thresholds, but the model gives {classes} classes; "
                "give one for each class, in the order of their ids, or one number for all"
            )
        if (self.top_k or 0) > classes:
            raise InvalidJob(f"task.top_k is {self.top_k}, but the model knows {classes} classes; lower it")
        known = LabelIndex(classes, resolve_class_names(self.labels, classes, labels, reader))
        return _MultilabelPostprocess(
            known, self.threshold, self.top_k or classes, self.scores, self.allow_nan, self.truth_columns
        )

    def compute_metrics(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """`images`, `unknown_truth`, `precision`, `recall` and `f1` over all classes together, and `exact_match`.

        `images` are those that count; `exact_match` is the share of them that list just the right classes. A rate over
        nothing is None.
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

    def _expected_truth_type(self, kind: pa.DataType) -> str | None:
        items = kind.value_type if _is_list(kind) else kind
        text_or_list = _is_list(kind) or not (pa.types.is_integer(kind) or pa.types.is_floating(kind))
        return (
            None if text_or_list and is_class_type(items) else "lists of labels or ids, or text with ';' between them"
        )


@dataclass(frozen=True)
class _MultilabelPostprocess:
    classes: LabelIndex
    threshold: float | tuple[float, ...]
    top_k: int
    scores: bool
    allow_nan: bool
    truth_columns: tuple[str, ...] = ()

    @property
    def fields(self) -> list[pa.Field]:
        all_scores = [pa.field("scores", pa.list_(pa.float32(), self.classes.count))] if self.scores else []
        return [pa.field("labels", _LISTS), *all_scores]

    def on_device(self, output: torch.Tensor) -> dict[str, torch.Tensor]:
        """`label_id` int32 and `score` float32 `[n, k]`, the highest first, of which `count` int32 `[n]` are shown.

        `finite` bool `[n]`; with `scores`, those of all classes by id, float32 `[n, classes]`.
        """
        import torch

        logits = output.float()
        scores = logits.sigmoid()
        limit = self.threshold
        shown = scores >= (torch.tensor(limit, device=scores.device) if isinstance(limit, tuple) else limit)
        # By the logits, for large ones all have the score 1; clamped, so that minus infinity is left to what is hidden.
        ranked = logits.clamp(min=torch.finfo(torch.float32).min).masked_fill(~shown, -torch.inf)
        ids = ranked.sort(dim=1, descending=True, stable=True).indices[:, : self.top_k]
        made = {
            "label_id": ids.to(torch.int32),
            "score": scores.gather(1, ids),
            "count": shown.sum(dim=1).clamp(max=self.top_k).to(torch.int32),
            "finite": ~scores.isnan().any(dim=1),
        }
        return made | {"scores": scores} if self.scores else made

    def columns(self, tensors: dict[str, torch.Tensor], geometries: Sequence[ImageGeometry]) -> list[pa.Array]:  # noqa: ARG002
        import numpy as np

        absent = np.zeros(len(tensors["finite"]), np.bool_) if self.allow_nan else ~finite_mask(tensors)
        counts = np.where(absent, 0, tensors["count"].numpy())
        listed = np.arange(tensors["label_id"].shape[1]) < counts[:, None]
        ids = pa.array(tensors["label_id"].numpy()[listed])
        shown = [ids, self._named(ids), pa.array(tensors["score"].numpy()[listed])]
        ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        structs = pa.StructArray.from_arrays(shown, fields=_CLASS_FIELDS)
        columns = [pa.ListArray.from_arrays(pa.array(ends), structs, type=_LISTS, mask=pa.array(absent))]
        if self.scores:
            flat = pa.array(tensors["scores"].contiguous().view(-1).numpy())
            columns.append(pa.FixedSizeListArray.from_arrays(flat, self.classes.count, mask=pa.array(absent)))
        return columns

    def find_errors(self, tensors: dict[str, torch.Tensor]) -> list[ErrorRecord | None]:
        return nonfinite_errors(tensors, self.allow_nan)

    def sum_metrics(self, rows: pa.RecordBatch) -> dict[str, float]:
        """`images`, `unknown_truth`, `exact`; over all classes `listed`, `right`, and `hits`, which are both."""
        import numpy as np

        rows = rows.filter(pc.is_valid(rows.column(self.truth_columns[0])))
        row, right = self._right(rows.column(self.truth_columns[0]))
        counts = np.ones(rows.num_rows, np.bool_)
        counts[row[right == UNKNOWN_CLASS]] = False
        truth = self._pairs(row, right, counts)
        listed = rows.column("labels")
        found = self.classes.canonical_ids(pc.list_flatten(listed).field("label_id"))
        shown = self._pairs(pc.list_parent_indices(listed).to_numpy(), found, counts)
        differing = np.setxor1d(truth, shown, assume_unique=True) // self.classes.count
        sums = {
            "images": int(counts.sum()),
            "unknown_truth": int((~counts).sum()),
            "exact": int(counts.sum()) - len(np.unique(differing)),
            "listed": len(shown),
            "right": len(truth),
            "hits": len(np.intersect1d(truth, shown, assume_unique=True)),
        }
        return {key: count for key, count in sums.items() if count}

    def _right(self, truths: pa.Array) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Row and class of all that is right; text is split at `;`, and empty parts of it are nothing."""
        text = as_text(truths)
        lists = truths if text is None else pc.split_pattern(text, ";")
        row, values = pc.list_parent_indices(lists), pc.list_flatten(lists)
        if text is not None:
            named = pc.not_equal(pc.utf8_trim_whitespace(values), "")
            row, values = row.filter(named), values.filter(named)
        return row.to_numpy(), self.classes.class_ids(values)

    def _pairs(
        self, row: np.ndarray[Any, Any], ids: np.ndarray[Any, Any], counts: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Each class of each row that counts, once, as one number."""
        import numpy as np

        of_use = counts[row]
        return np.unique(row[of_use].astype(np.int64) * self.classes.count + ids[of_use])

    def _named(self, ids: pa.Array) -> pa.Array:
        if self.classes.labels is None:
            return pa.nulls(len(ids), pa.string())
        return self._label_array.take(ids)

    @cached_property
    def _label_array(self) -> pa.Array:
        return pa.array(self.classes.labels, pa.string())


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))
