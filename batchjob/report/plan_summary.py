"""Summary of a plan that was written: ids, images and shards, as data and text."""

from __future__ import annotations

from dataclasses import dataclass

from batchjob.text import format_count

__all__ = ["PlanSummary"]


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """A frozen plan in numbers. Its fields are the keys of `batchjob plan --json`.

    Attributes:
        plan: Id of the plan.
        images: Images in the plan.
        shards: Shards in the plan.
        shard_size: Images per shard; the last shard may hold fewer.
        output: URI of the output.
        seconds: Time to write the plan, in seconds.
        created: Time at which the plan was begun, in ISO 8601, UTC.
        written: False if the plan was complete already, so that nothing was written.
    """

    plan: str
    images: int
    shards: int
    shard_size: int
    output: str
    seconds: float
    created: str = ""
    written: bool = True

    def lines(self) -> list[str]:
        """Return the summary as lines of text for a person."""
        images, shards = format_count(self.images, "image"), format_count(self.shards, "shard")
        end = f"written in {self.seconds:.1f} s" if self.written else f"there since {self.created}; nothing was written"
        return [f"plan {self.plan} in {self.output}: {images} in {shards} of {self.shard_size:,}, {end}"]
