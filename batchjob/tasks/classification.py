"""`type: classification`: logits to the k likeliest classes, with their names and softmax scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pyarrow as pa
from pydantic import BeforeValidator, Field

from batchjob.errors import InvalidJob
from batchjob.records import Fault, Frame
from batchjob.settings import Settings, Uri
from batchjob.tasks.labels import read_labels
from batchjob.tasks.postprocess import Postprocess, faults, float_rows, present

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from batchjob.storage import Reader

__all__ = ["ClassificationTask"]

_LABEL_BYTES = 128
_CLASS_FIELDS = [pa.field("label_id", pa.int32()), pa.field("label", pa.string()), pa.field("score", pa.float32())]
_FIELDS = [*_CLASS_FIELDS, pa.field("top_k", pa.list_(pa.struct(_CLASS_FIELDS)))]
_WANTED = "classification wants [n, classes]: a row of logits for each image"
_ADVICE = "wrap the model so that it returns its logits (model.type: python), or use another task"


def _numbers_as_text(value: Any) -> Any:
    """Digits are fair labels; `yes` and `no`, which YAML may take for truth values, must be quoted."""
    if not isinstance(value, list | tuple):
        return value
    return [str(label) if type(label) is int else label for label in value]


class ClassificationTask(Settings):
    """Which class an image shows.

    Attributes:
        top_k: classes a row lists, the likeliest first.
        labels: names by id, as a list, or a file of one a line, a JSON list, or a JSON object `id: label`. The
            weights' own names where not given; null where they have none either.
        allow_nan: True lets rows pass whose scores are NaN; their `score` is NaN and they name no class.
    """

    type: Literal["classification"] = "classification"
    top_k: int = Field(default=1, ge=1)
    labels: Annotated[tuple[str, ...] | Uri | None, BeforeValidator(_numbers_as_text)] = None
    allow_nan: bool = False

    @property
    def row_bytes(self) -> int:
        """A bound on the bytes that a row's columns take."""
        listed = self.labels if isinstance(self.labels, tuple) else ()
        label = max((len(name.encode()) for name in listed), default=_LABEL_BYTES)
        return (self.top_k + 1) * (12 + label) + 8

    def check(self, reader: Reader) -> None:
        """Reads the label file, if there is one, without torch. Raises InvalidJob, Unavailable."""
        if isinstance(self.labels, str):
            read_labels(reader, self.labels)

    def adapt(self, module: nn.Module) -> nn.Module:
        """The module as it is."""
        return module

    def prepare(self, output: Any, labels: tuple[str, ...] | None, reader: Reader) -> Postprocess:
        """Looks at one output before work starts.

        Args:
            output: what the model gave for `EXAMPLE_ROWS` images.
            labels: what the weights bring.
            reader: for a label file.

        Raises:
            InvalidJob: the output is not `[n, classes]`, labels do not fit it, or `top_k` is more than it has.
            Unavailable: the store of the label file cannot be reached.
        """
        logits = float_rows(output, _WANTED, _ADVICE)
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
        return _TopK(self.top_k, self._names(classes, labels, reader), self.allow_nan)

    def _names(self, classes: int, own: tuple[str, ...] | None, reader: Reader) -> tuple[str, ...] | None:
        given, source = own, "the weights name"
        if isinstance(self.labels, str):
            given, source = read_labels(reader, self.labels), f"task.labels: {self.labels} has"
        elif self.labels is not None:
            given, source = self.labels, "task.labels has"
        if given is not None and len(given) != classes:
            raise InvalidJob(
                f"{source} {len(given)} labels, but the model gives {classes} classes; "
                "give one label for each class, in the order of their ids, under task.labels"
            )
        return given


@dataclass(frozen=True)
class _TopK:
    top_k: int
    labels: tuple[str, ...] | None
    allow_nan: bool
    truth: str | None = None

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

    def columns(self, tensors: dict[str, torch.Tensor], frames: Sequence[Frame]) -> list[pa.Array]:  # noqa: ARG002
        good = present(tensors)
        ids, scores = tensors["label_id"].numpy(), tensors["score"].numpy()
        first = pa.array(ids[:, 0], mask=~good)
        best = pa.array(scores[:, 0]) if self.allow_nan else pa.array(scores[:, 0], mask=~good)
        return [first, self._named(first), best, self._lists(ids[good], scores[good], good)]

    def faults(self, tensors: dict[str, torch.Tensor]) -> list[Fault | None]:
        return faults(tensors, self.allow_nan)

    def tally(self, rows: pa.RecordBatch) -> dict[str, float]:  # noqa: ARG002
        return {}

    def _named(self, ids: pa.Array) -> pa.Array:
        if self.labels is None:
            return pa.nulls(len(ids), pa.string())
        return self._label_array.take(ids)

    @cached_property
    def _label_array(self) -> pa.Array:
        return pa.array(self.labels, pa.string())

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
