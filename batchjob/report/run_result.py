"""What a run or a plan came to, for people and for machines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from batchjob.errors import BatchjobError
from batchjob.text import format_count, sanitize

__all__ = ["PlanSummary", "RunResult"]


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended.

    Attributes:
        status: complete, already_complete, over_budget, incomplete, invalid, temporary or crashed.
        planned: images in the plan, as far as it was known.
        predicted: rows that hold a prediction; `failed` of the others hold an error.
        seconds: wall time of this run.
        images_per_second: rows this run committed, over `seconds`.
        output: URI of the output, None where the job could not be read.
        exit_code: 0, 1, 2, 3, 4 or 75.
        message: one sentence for a person.
        truth: how right the rows were, where the task was told what is right.
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

    @classmethod
    def from_error(cls, error: BaseException, output: str | None = None, seconds: float = 0.0) -> RunResult:
        """The outcome of a run that an error ended, with the counts that it carries. An interrupt is temporary."""
        counts = (0, 0, 0)
        if isinstance(error, BatchjobError):
            status, code, message, counts = error.status, error.exit_code, error.message, error.counts
        elif isinstance(error, KeyboardInterrupt):
            status, code, message = "temporary", 75, "interrupted; the same command resumes"
        else:
            status, code, message = "crashed", 1, sanitize(f"{type(error).__name__}: {error}")
        return cls(status, *counts, seconds=seconds, output=output, exit_code=code, message=message)

    def to_json(self) -> str:
        """One line of JSON."""
        fields = asdict(self)
        for name, digits in (("seconds", 3), ("images_per_second", 2)):
            fields[name] = round(fields[name], digits)
        return json.dumps(fields)

    def to_text(self) -> str:
        """What a person reads at the end: the message, or the sums where there is none; and how right the rows were."""
        said = self.message or self._sums()
        return f"{said}\n{_flat(self.truth)}" if _flat(self.truth) else said

    def _sums(self) -> str:
        sums = (
            f"{format_count(self.planned, 'image')}, {self.predicted:,} predicted, {self.failed:,} failed{self._pace()}"
        )
        return f"{self.output}: {self.status.replace('_', ' ')}: {sums}"

    def _pace(self) -> str:
        """Of the images that this run has done."""
        if not self.images_per_second:
            return ""
        done = round(self.seconds * self.images_per_second)
        these = f"; {done:,} of them in this run," if done != self.planned else ""
        return f"{these} in {self.seconds:,.1f} s, {self.images_per_second:,.1f} images/s"


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """A frozen plan, in numbers."""

    plan: str
    images: int
    shards: int
    shard_size: int
    output: str
    seconds: float

    def lines(self) -> list[str]:
        """For a person."""
        return [
            (
                f"plan {self.plan} in {self.output}: {format_count(self.images, 'image')} in "
                f"{format_count(self.shards, 'shard')} of {self.shard_size:,}, written in {self.seconds:.1f} s"
            )
        ]


def _flat(truth: Mapping[str, Any]) -> str:
    """The summary's numbers in a line, `accuracy 0.804 over 1,000 rows with truth`; empty where there are none."""
    rates = [f"{name} {value:.4g}" for name, value in truth.items() if isinstance(value, float)]
    sums = {name: value for name, value in truth.items() if isinstance(value, int) and not isinstance(value, bool)}
    rows = sums.pop("images", None)
    if rows is not None:
        told = f"{', '.join(rates)} over {format_count(rows, 'row')} with truth" if rates else "no rows with truth"
        rates = [told]
    return ", ".join([*rates, *(f"{name} {value:,}" for name, value in sums.items() if value)])
