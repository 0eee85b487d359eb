"""Result of a run: status, exit code and counts, as data, one line of JSON, or text."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from batchjob.errors import BatchjobError, CheckFailed, Incomplete, InvalidJob, JobError, Temporary
from batchjob.report.output_status import read_errors
from batchjob.storage.options import OptionsByPrefix
from batchjob.storage.store import Store, open_store
from batchjob.text import format_count, sanitize

if TYPE_CHECKING:
    from pyarrow.dataset import Dataset

__all__ = ["RunResult"]


@dataclass(frozen=True, slots=True)
class RunResult:
    """Result of a run. Its fields are the keys of `batchjob run --json`.

    Attributes:
        status: complete, already_complete, over_budget, incomplete, invalid, temporary or crashed.
        planned: Images in the plan, as far as the plan was known when the run ended.
        predicted: Rows that hold a prediction.
        failed: Rows that hold an error.
        seconds: Wall time of this run, in seconds.
        images_per_second: Rows that this run committed, divided by `seconds`.
        output: URI of the output; None if the job could not be read.
        exit_code: 0, 1, 2, 3, 4 or 75.
        message: One sentence for a person; empty if the counts say it all.
        truth: Metrics of the task (accuracy and the like); empty if the job names no ground truth.
        storage: Storage options of the job, with which `table` and `errors` read the output; no key of `--json`.

    Example:
        ```
        result = batchjob.run(job).raise_for_status()
        rows = result.table().to_table(columns=["uri", "label"]).to_pylist()
        ```
    """

    status: str
    planned: int = 0
    predicted: int = 0
    failed: int = 0
    seconds: float = 0.0
    images_per_second: float = 0.0
    output: str | None = None
    exit_code: int = 0
    message: str = ""
    truth: Mapping[str, Any] = field(default_factory=dict)
    storage: OptionsByPrefix = field(default_factory=dict, repr=False, compare=False)

    def raise_for_status(self) -> RunResult:
        """Return the result itself if the run is complete, as `already_complete` is too.

        Raises:
            CheckFailed: Exit code 3: over the error budget.
            Incomplete: Exit code 4: shards gave up; run again.
            Temporary: Exit code 75: try again later.
            InvalidJob: Exit code 2.
            JobError: Any other exit code.
        """
        if not self.exit_code:
            return self
        kinds = {kind.exit_code: kind for kind in (InvalidJob, CheckFailed, Incomplete, Temporary)}
        error = kinds.get(self.exit_code, JobError)(self.message or self.describe_counts())
        error.counts = (self.planned, self.predicted, self.failed)
        raise error

    def table(self) -> Dataset:
        """Open the committed rows as a pyarrow dataset, error rows included; nothing but one footer is read by then.

        Returns:
            Dataset of `predictions/`: `.to_table(columns=[…], filter=…)`, `.to_batches()`, `.count_rows()`.

        Raises:
            InvalidJob: No row is committed yet, or the output is not known.
            Unavailable: The store cannot be reached.

        Example:
            `result.table().to_table(filter=pyarrow.dataset.field("error_type").is_null()).to_pandas()`
        """
        from batchjob.output.committed_rows import open_rows  # pyarrow's dataset takes a while to import

        return open_rows(self._open_output())

    def errors(self) -> Iterator[dict[str, Any]]:
        """Read the error rows, in plan order: `position`, `uri`, `error_stage`, `error_type` and `error_message`.

        Raises:
            InvalidJob: There is no plan, or the output is not known.

        Example:
            `Counter(row["error_type"] for row in result.errors())`
        """
        return read_errors(self._open_output())

    def _open_output(self) -> Store:
        if self.output is None:
            raise InvalidJob(f"this run has no output: {self.message or self.status}")
        return open_store(self.output, self.storage)

    @classmethod
    def from_error(cls, error: BaseException, output: str | None = None, seconds: float = 0.0) -> RunResult:
        """Make the result of a run that ended with an error.

        Args:
            error: A BatchjobError gives status, exit code, message and counts. KeyboardInterrupt is temporary; any
                other error is a crash.
            output: URI of the output; None if it is unknown.
            seconds: Wall time of the run, in seconds.
        """
        counts = (0, 0, 0)
        if isinstance(error, BatchjobError):
            status, code, message, counts = error.status, error.exit_code, error.message, error.counts
        elif isinstance(error, KeyboardInterrupt):
            status, code, message = "temporary", 75, "interrupted; the same command resumes"
        else:
            status, code, message = "crashed", 1, sanitize(f"{type(error).__name__}: {error}")
        return cls(status, *counts, seconds=seconds, output=output, exit_code=code, message=message)

    def to_json(self) -> str:
        """Return the result as one line of JSON."""
        fields = asdict(replace(self, storage={}))
        del fields["storage"]
        for name, digits in (("seconds", 3), ("images_per_second", 2)):
            fields[name] = round(fields[name], digits)
        return json.dumps(fields)

    def to_text(self) -> str:
        """Return the last words of a run to a person: the message, or else the counts; then the metrics."""
        lines = [self.message or self.describe_counts(), _format_metrics(self.truth), self._describe_next_step()]
        return "\n".join(line for line in lines if line)

    @classmethod
    def of_error(cls, error: BaseException, output: str | None = None, seconds: float = 0.0) -> RunResult:
        """Deprecated name of `from_error`."""
        _warn_renamed("of_error", "from_error")
        return cls.from_error(error, output, seconds)

    def dump(self) -> str:
        """Deprecated name of `to_json`."""
        _warn_renamed("dump", "to_json")
        return self.to_json()

    def sentence(self) -> str:
        """Deprecated name of `to_text`."""
        _warn_renamed("sentence", "to_text")
        return self.to_text()

    def describe_counts(self) -> str:
        """Describe status and counts in one line, such as `OUT: complete: 3 images, 2 predicted, 1 failed`."""
        counts = f"{format_count(self.planned, 'image')}, {self.predicted:,} predicted, {self.failed:,} failed"
        return f"{self.output}: {self.status.replace('_', ' ')}: {counts}{self._format_speed()}"

    def _describe_next_step(self) -> str:
        """Return where the rows of a complete output are, and what to type next; empty for any other."""
        if self.exit_code or self.output is None:
            return ""
        command = f"batchjob errors {self.output}" if self.failed else f"batchjob status {self.output}"
        return f"rows: {self.output.rstrip('/')}/predictions/*.parquet; next: `{command}`"

    def _format_speed(self) -> str:
        """Return time and images/s of this run; empty if it committed nothing."""
        if not self.images_per_second:
            return ""
        committed = round(self.seconds * self.images_per_second)
        prefix = f"; {committed:,} of them in this run," if committed != self.planned else ""
        return f"{prefix} in {self.seconds:,.1f} s, {self.images_per_second:,.1f} images/s"


def _warn_renamed(old: str, new: str) -> None:
    warnings.warn(f"RunResult.{old} is now RunResult.{new}", DeprecationWarning, stacklevel=3)


def _format_metrics(metrics: Mapping[str, Any]) -> str:
    """Format a task's metrics in one line, such as `accuracy 0.804 over 1,000 rows with truth`; empty if none."""
    rates = [f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, float)]
    counts = {name: value for name, value in metrics.items() if isinstance(value, int) and not isinstance(value, bool)}
    rows = counts.pop("images", None)
    if rows is not None:
        rates = [f"{', '.join(rates)} over {format_count(rows, 'row')} with truth" if rates else "no rows with truth"]
    return ", ".join([*rates, *(f"{name} {value:,}" for name, value in counts.items() if value)])
