"""Provenance of a part: its footer, and the summary of its shard that goes to the driver."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from sys import intern
from typing import Any

from batchjob.types import ShardKey

__all__ = ["PartFooter", "ShardResult"]


@dataclass(frozen=True, slots=True)
class PartFooter:
    """Provenance in a part's Parquet footer: JSON under the key `batchjob`. Holds no host names and no secrets.

    Attributes:
        plan: Id of the plan.
        shard: Id of the shard.
        index: Index of the shard in the plan, from 0.
        attempt: Random id of the attempt that wrote the part.
        revision: Revision of the part: 0, plus 1 with each `retry`.
        fingerprint: SHA-256 of the job's fingerprint.
        model: Digest of weights and model code.
        rows: Rows in the part.
        failed: Error rows among them.
        errors: Error rows by `stage/type`.
        seconds: Seconds by stage; `wall` is the time from the first batch to the commit.
        versions: Versions by package.
        truth: Sums by name, from which the task computes its metrics; they add up over parts.
        recipe: Execution config of the model, as text; empty in parts of early versions.
    """

    plan: str
    shard: str
    index: int
    attempt: str
    revision: int
    fingerprint: str
    model: str
    rows: int
    failed: int
    errors: Mapping[str, int]
    seconds: Mapping[str, float]
    versions: Mapping[str, str]
    truth: Mapping[str, float] = field(default_factory=dict)
    recipe: str = ""

    KEY = "batchjob"

    def to_json(self) -> str:
        """Write the footer as JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> PartFooter:
        """Read a footer from JSON; fields that a later version added are ignored.

        Raises:
            ValueError: The text is not JSON.
            TypeError: A field is missing, or the text is not a JSON object.
        """
        values: dict[str, Any] = dict(json.loads(text))
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def compact(self) -> PartFooter:
        """Return an equal footer that shares equal values with others: a driver keeps one in memory per part."""
        return replace(
            self,
            plan=intern(self.plan),
            fingerprint=intern(self.fingerprint),
            model=intern(self.model),
            recipe=intern(self.recipe),
            errors=_intern_keys(self.errors),
            seconds=_intern_keys(self.seconds),
            versions=_share_versions(tuple(self.versions.items())),
            truth=_intern_keys(self.truth),
        )


def _intern_keys(values: Mapping[str, Any]) -> Mapping[str, Any]:
    return {intern(name): value for name, value in values.items()}


@lru_cache(maxsize=64)
def _share_versions(versions: tuple[tuple[str, str], ...]) -> Mapping[str, str]:
    return dict(versions)


@dataclass(frozen=True, slots=True)
class ShardResult:
    """Summary of a committed shard; small, because it travels from a worker to the driver.

    Attributes:
        key: Key of the shard.
        footer: Footer of the committed part.
        error_examples: One `uri: message` for each `stage/type`.
        committed_here: False if another attempt had committed the part first.
        etag: ETag of the part; None where the store has none.
    """

    key: ShardKey
    footer: PartFooter
    error_examples: Mapping[str, str]
    committed_here: bool
    etag: str | None
