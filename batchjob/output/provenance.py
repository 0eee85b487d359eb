"""The nouns: frozen data that the rooms hand to each other. No behaviour beyond reading and writing themselves."""

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
    """What a part's footer says of its making, under one key, as JSON. No hosts, no secrets.

    Attributes:
        plan: id of the plan, `shard` and `index` which of its shards.
        attempt: random id of the attempt that made it.
        revision: 0, one more with each `retry`.
        fingerprint: sha256 of the job's fingerprint.
        model: digest of weights and model code.
        rows: in the part; `failed` of them carry an error.
        errors: `stage/type` → count.
        seconds: stage → seconds; `wall` is start to commit.
        versions: package → version.
        truth: sums by name, from which the task tells how right it was; they add up over parts.
        recipe: in words, by which the model ran.
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
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> PartFooter:
        """What a later version has added is passed over.

        Raises:
            ValueError, TypeError: the text is no provenance record.
        """
        found: dict[str, Any] = dict(json.loads(text))
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in found.items() if name in known})

    def compact(self) -> PartFooter:
        """The same, holding but once what the parts of a run say alike: a driver keeps one of these a part."""
        return replace(
            self,
            plan=intern(self.plan),
            fingerprint=intern(self.fingerprint),
            model=intern(self.model),
            recipe=intern(self.recipe),
            errors=_compact(self.errors),
            seconds=_compact(self.seconds),
            versions=_shared(tuple(self.versions.items())),
            truth=_compact(self.truth),
        )


def _compact(figures: Mapping[str, Any]) -> Mapping[str, Any]:
    return {intern(name): figure for name, figure in figures.items()}


@lru_cache(maxsize=64)
def _shared(versions: tuple[tuple[str, str], ...]) -> Mapping[str, str]:
    return dict(versions)


@dataclass(frozen=True, slots=True)
class ShardResult:
    """Summary of a committed shard: small, for it crosses the cluster.

    Attributes:
        key: which shard.
        made: what the committed part's footer says.
        examples: `stage/type` → one `uri: message`.
        ours: False when a rival had committed it first.
        etag: the part's tag.
    """

    key: ShardKey
    footer: PartFooter
    error_examples: Mapping[str, str]
    committed_here: bool
    etag: str | None
