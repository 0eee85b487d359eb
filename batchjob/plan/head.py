"""The head of a plan: who and what it is; put once, compared before anything else, buried by a tombstone."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from batchjob.errors import InvalidJob, NotFound
from batchjob.storage.store import Store, put_or_get

__all__ = [
    "FORMAT_VERSION",
    "PlanHead",
    "discard_plan",
    "is_discarded",
    "is_plan_id_discarded",
    "new_head",
    "put_head",
    "read_current_head",
    "report_damage",
]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class PlanHead:
    """What a plan is: written first, compared before anything else.

    Attributes:
        plan: random id of this plan.
        number: its folder; grows by one with each `discard`.
        job: the job as submitted, its folder's paths written `./…`.
        fingerprint: the settings that alter predictions, by dotted name.
        shard_size: images a shard.
        source_version: digest of the manifest, None where the source has no version.
        defaults: what all other settings that alter predictions stood at; none in plans of older versions.
    """

    plan: str
    number: int
    job: dict[str, Any]
    fingerprint: dict[str, Any]
    shard_size: int
    source_version: str | None
    batchjob: str
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    format: int = FORMAT_VERSION
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return _folder(self.number)


def new_head(number: int, **facts: Any) -> PlanHead:
    """A head with a fresh random plan id."""
    return PlanHead(plan=secrets.token_hex(8), number=number, **facts)


def read_current_head(store: Store) -> tuple[int, PlanHead | None]:
    """The number of the plan in force and its head; head None when none is written yet.

    Raises:
        InvalidJob: the plan was written in a format that this version does not know (a discarded one may be), or its
            head is damaged.
    """
    number = 0
    while (data := _read(store, f"{_folder(number)}head.json")) is not None:
        if _read(store, f"{_folder(number)}discarded") is None:
            return number, _parse_head(data, store, number)
        number += 1
    return number, None


def put_head(store: Store, head: PlanHead, delete_stale_parts: Callable[[list[str]], None] | None = None) -> PlanHead:
    """Put the head if absent, while `predictions/` is empty; another driver's head is adopted instead.

    Args:
        store: of the output.
        head: of the plan.
        clear: takes away what lies there without a plan, or raises where no discarded plan left it.

    Raises:
        InvalidJob: parts lie there without a plan, and there is no `clear`.
    """
    key = f"{head.folder}head.json"
    foreign = [stat.uri for stat in store.list("predictions/")]
    if foreign and _read(store, key) is None:  # with a head, another driver has begun meanwhile
        if delete_stale_parts is None:
            raise InvalidJob(
                f"{store.uri}: {foreign[0]} is there but no plan is; output.uri must be empty or hold this job's own "
                "output: choose another folder, or remove it"
            )
        delete_stale_parts(foreign)
    return _parse_head(put_or_get(store, key, json.dumps(asdict(head), indent=1).encode()), store, head.number)


def is_discarded(store: Store, head: PlanHead) -> bool:
    """Whether the plan's tombstone stands."""
    return _read(store, f"{head.folder}discarded") is not None


def is_plan_id_discarded(store: Store, plan_id: str) -> bool:
    """Whether `plan` is the id of a discarded plan of this output."""
    number = 0
    while (data := _read(store, f"{_folder(number)}head.json")) is not None:
        if _facts(data, store, number)["plan"] == plan_id:
            return _read(store, f"{_folder(number)}discarded") is not None
        number += 1
    return False


def discard_plan(store: Store, head: PlanHead) -> None:
    """Put the tombstone: from now on no worker commits a part of this plan."""
    put_or_get(store, f"{head.folder}discarded", b"{}\n")


def _parse_head(data: bytes, store: Store, number: int) -> PlanHead:
    facts = _facts(data, store, number)
    if facts.get("format") != FORMAT_VERSION:
        raise InvalidJob(
            f"{store.uri}: its plan has format {facts.get('format')}, this version knows {FORMAT_VERSION}; "
            f"finish it with batchjob {facts.get('batchjob')}"
        )
    try:
        return PlanHead(**facts)
    except TypeError as error:
        raise _damaged(store, number, error) from error


@contextmanager
def report_damage(store: Store, key: str) -> Iterator[None]:
    """Around the reading of a plan's bytes: whatever is wrong with them is an InvalidJob that names them."""
    try:
        yield
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError, OverflowError) as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise InvalidJob(
            f"{store.uri}/{key} is damaged ({said}); put it back as it was, or `batchjob discard {store.uri} --yes` "
            "and run again"
        ) from error


def _facts(data: bytes, store: Store, number: int) -> dict[str, Any]:
    try:
        facts = json.loads(data)
        if not isinstance(facts, dict) or "plan" not in facts:
            raise ValueError("it names no plan")
    except ValueError as error:
        raise _damaged(store, number, error) from error
    return facts


def _damaged(store: Store, number: int, error: Exception) -> InvalidJob:
    return InvalidJob(
        f"{store.uri}/{_folder(number)}head.json is damaged ({error}); put it back as it was, or choose another "
        "output.uri"
    )


def _folder(number: int) -> str:
    return f"_batchjob/plans/{number:04d}/"


def _read(store: Store, key: str) -> bytes | None:
    try:
        return store.read(key).data
    except NotFound:
        return None
