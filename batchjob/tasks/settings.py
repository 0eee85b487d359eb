"""What the settings of every task have in common: nothing to check, nothing to adapt, nothing known to be right."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa

from batchjob.errors import InvalidJob
from batchjob.settings import Settings

if TYPE_CHECKING:
    from torch import nn

    from batchjob.storage.reader import Reader

__all__ = ["TaskSettings"]


class TaskSettings(Settings):
    """Settings of a task. Beside these methods each has a `type`, `row_bytes` and `prepare`.

    Attributes:
        classes: whether the largest number of an image's output names its class, so that a faster recipe must name the
            same one.
    """

    argmax_is_class: ClassVar[bool] = False

    @property
    def truth_columns(self) -> tuple[str, ...]:
        """The passthrough columns that hold what is right."""
        return ()

    def check(self, reader: Reader, base: Path) -> None:
        """Looks, without torch, at the files that the task names.

        Args:
            reader: for label files.
            base: the job's folder, for the user's own code.

        Raises:
            InvalidJob: one is not there or cannot be used.
            Unavailable: the store of one cannot be reached.
        """

    def check_truth_columns(self, columns: Sequence[pa.Field]) -> None:
        """Raises InvalidJob where `truths` are not among these passthrough columns, or of a type that cannot be right.

        Args:
            columns: the source's passthrough fields.
        """
        known = {column.name: column.type for column in columns}
        for name in self.truth_columns:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"write input.passthrough: [{name}]"
                raise InvalidJob(f"task.truth: {name!r} is no passthrough column; {hint}")
            if (wanted := self._expected_truth_type(known[name])) is not None:
                raise InvalidJob(
                    f"task.truth: column {name!r} holds {known[name]}, but this task wants {wanted}; "
                    f"give it a type, as in passthrough: {{{name}: …}}, or name another column"
                )

    def adapt(self, module: nn.Module) -> nn.Module:
        """The module as the task runs it: as it is."""
        return module

    def digest(self, base: Path) -> str | None:
        """sha256 over the user's own code that the task runs, in hex; None where there is none. Raises InvalidJob."""

    def compute_metrics(self, sums: Mapping[str, float]) -> dict[str, Any]:  # noqa: ARG002 - not every task tells
        """How right the rows were, as `report.json` says it; nothing where no `truth` is named.

        Args:
            sums: what `Postprocess.tally` gave, added up over all batches of all parts.
        """
        return {}

    def _expected_truth_type(self, kind: pa.DataType) -> str | None:  # noqa: ARG002
        """None where a truth column may be of this type, else what it may be."""
        return None
