"""What a run or a plan came to, for people and for machines."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from batchjob.errors import BatchjobError

__all__ = ["Outcome", "PlanSummary"]


@dataclass(frozen=True, slots=True)
class Outcome:
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

    @classmethod
    def of_error(cls, error: BaseException, output: str | None = None, seconds: float = 0.0) -> Outcome:
        """The outcome of a run that an error ended before it could say more. An interrupt is temporary."""
        if isinstance(error, BatchjobError):
            status, code, message = error.status, error.exit_code, error.message
        elif isinstance(error, KeyboardInterrupt):
            status, code, message = "temporary", 75, "interrupted; the same command resumes"
        else:
            status, code, message = "crashed", 1, f"{type(error).__name__}: {error}"
        return cls(status, seconds=seconds, output=output, exit_code=code, message=message)

    def dump(self) -> str:
        """One line of JSON."""
        fields = asdict(self)
        for name, digits in (("seconds", 3), ("images_per_second", 2)):
            fields[name] = round(fields[name], digits)
        return json.dumps(fields)

    def sentence(self) -> str:
        """What a person reads at the end: the message, or the sums where there is none."""
        if self.message:
            return self.message
        pace = f" in {self.seconds:,.1f} s, {self.images_per_second:,.1f} images/s" if self.seconds else ""
        sums = f"{self.planned:,} images, {self.predicted:,} predicted, {self.failed:,} failed{pace}"
        return f"{self.output}: {self.status.replace('_', ' ')}: {sums}"


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
                f"plan {self.plan} in {self.output}: {self.images:,} images in {self.shards:,} shards of "
                f"{self.shard_size:,}, written in {self.seconds:.1f} s"
            )
        ]
