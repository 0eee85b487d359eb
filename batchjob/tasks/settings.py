"""Base settings of all tasks, with no-op defaults for validation, model adaptation and ground truth."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import pyarrow as pa

from batchjob.errors import InvalidJob
from batchjob.settings import Decision, Settings
from batchjob.tasks.labels import read_labels
from batchjob.text import closest_match

if TYPE_CHECKING:
    from torch import nn

    from batchjob.storage.reader import Reader
    from batchjob.tasks.postprocess import Postprocess

__all__ = ["RunModel", "TaskContext", "TaskModel", "TaskSettings"]


class TaskModel(Protocol):
    """Loaded model, as a task sees it."""

    @property
    def module(self) -> nn.Module:
        """Module in eval mode."""

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Class names that the weights bring."""

    @property
    def eager(self) -> bool:
        """True if Python code computes the output, and no graph that was compiled or exported."""

    @property
    def output_operation(self) -> str | None:
        """Operation that makes the output, such as `Softmax`, if the model's file says it."""

    @property
    def class_layers(self) -> tuple[str, ...]:
        """Names of the layers that turn features into class scores; empty if the format does not know them."""

    @property
    def gives_features(self) -> str | None:
        """Reason why the output is features and no class scores; None if it may be class scores."""


class RunModel(Protocol):
    """Runs of a module on images, to look at its output."""

    def __call__(self, module: nn.Module) -> Iterator[Any]:
        """Yield a module's output for `EXAMPLE_ROWS` copies of an image, for a few images one after the other.

        Raises:
            InvalidJob: The module fails.
        """


@dataclass(frozen=True)
class TaskContext:
    """Model and job around a task.

    Attributes:
        model_labels: Class names that the weights bring; None if they bring none.
        reader: Reader for a label file.
        folder: Folder of the job file, where the user's own code lies.
    """

    model_labels: tuple[str, ...] | None
    reader: Reader
    folder: Path


class TaskSettings(Settings):
    """Settings of a task. Each task adds a `type`, `row_bytes` and `build_postprocess`.

    A task with classes has a field `labels`, one that can be compared with the ground truth a field `truth`. A method
    here does what all tasks with such a field do; for the others it does nothing.

    Attributes:
        argmax_is_class: True if the index of the largest value in an image's output is its class. A faster execution
            config is then accepted only if it predicts the same class.
    """

    argmax_is_class: ClassVar[bool] = False

    @property
    def truth_columns(self) -> tuple[str, ...]:
        """Passthrough columns that hold the ground truth."""
        truth = getattr(self, "truth", None)
        return () if truth is None else (truth,)

    def check(self, reader: Reader, folder: Path) -> None:  # noqa: ARG002 - not every task runs the user's code
        """Check the files that the task names, without importing torch.

        Args:
            reader: Reader for label files.
            folder: Folder of the job file, where the user's own code lies.

        Raises:
            InvalidJob: If a file is missing or cannot be used.
            Unavailable: If the store of a file cannot be reached.
        """
        for uri in self._label_files:
            read_labels(reader, uri)

    def list_files(self, folder: Path) -> list[str]:  # noqa: ARG002
        """Return the URIs of the files that decide the columns, beside those of the model: labels and code.

        Raises:
            InvalidJob: If the code cannot be found.
        """
        return self._label_files

    def check_truth_columns(self, columns: Sequence[pa.Field]) -> None:
        """Check that the source provides the ground truth columns, with a type that this task can compare.

        Args:
            columns: Passthrough fields of the source.

        Raises:
            InvalidJob: If a column is missing or has another type.
        """
        types = {column.name: column.type for column in columns}
        for name in self.truth_columns:
            if name not in types:
                match = closest_match(name, list(types))
                hint = f"did you mean {match!r}?" if match else f"write input.passthrough: [{name}]"
                raise InvalidJob(f"task.truth: {name!r} is no passthrough column; {hint}")
            if (expected := self._expected_truth_type(types[name])) is not None:
                raise InvalidJob(
                    f"task.truth: column {name!r} holds {types[name]}, but this task wants {expected}; "
                    f"give it a type, as in passthrough: {{{name}: …}}, or name another column"
                )

    def decide(self, model: TaskModel, run_model: RunModel) -> Mapping[str, Decision]:  # noqa: ARG002
        """Choose values for the fields that are left at `auto`, by looking at the model.

        A plan keeps these values, and all its workers use them.

        Args:
            model: Model, not adapted yet.
            run_model: Runs a module, the model's own or another form of it.

        Returns:
            Decisions by field; by default none.

        Raises:
            InvalidJob: The model does not suit the task.
        """
        return {}

    def adapt(self, module: nn.Module) -> nn.Module:
        """Return the module that produces the output this task reads; by default the model itself."""
        return module

    @abstractmethod
    def build_postprocess(self, output: Any, context: TaskContext) -> Postprocess:
        """Build the postprocess for an adapted model, from its output for an example batch.

        Args:
            output: Output of the model for `EXAMPLE_ROWS` images.
            context: Model and job around the task.

        Raises:
            InvalidJob: If the output, the labels or the user's code do not fit the task.
            Unavailable: If the store of the label file cannot be reached.
        """

    def digest(self, folder: Path) -> str | None:
        """Return the sha256 of the user's own code that the task runs, in hex; None if it runs none.

        Raises:
            InvalidJob: If the code cannot be found.
        """

    def compute_metrics(self, sums: Mapping[str, float]) -> dict[str, Any]:  # noqa: ARG002 - not every task has metrics
        """Compute the metrics for `report.json`; empty if the job names no `truth`.

        Args:
            sums: Results of `Postprocess.sum_metrics`, added up over all batches of all parts.
        """
        return {}

    @property
    def _label_files(self) -> list[str]:
        labels = getattr(self, "labels", None)
        return [labels] if isinstance(labels, str) else []

    def _expected_truth_type(self, data_type: pa.DataType) -> str | None:  # noqa: ARG002
        """Return None if a ground truth column may have this type, else the expected types in words."""
        return None
