"""Head of a plan: id, job and fingerprint. Written once, before anything else; a tombstone beside it ends the plan."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from batchjob.errors import InvalidJob
from batchjob.storage.store import Store, put_or_get, read_if_present
from batchjob.types import is_stray_key

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
    """The identity of a plan, stored as `head.json` under the names of these attributes.

    Attributes:
        plan: Random id of the plan.
        number: Number of its folder, from 0; each `discard` adds one.
        job: The job as submitted; paths below its folder are written `./…`.
        fingerprint: The settings that alter predictions and were set explicitly: section, then field.
        shard_size: Images in a shard; the last shard may have fewer.
        source_version: Digest of the manifest; None if the source has no version.
        batchjob: Version of batchjob that wrote the plan.
        created: Time of creation, UTC, ISO 8601.
        format: Version of the plan's format.
        defaults: Values of all settings that alter predictions, set or not; empty in plans of older versions.
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
        """Key prefix of everything that belongs to this plan; ends with `/`."""
        return _plan_folder(self.number)


def new_head(number: int, **facts: Any) -> PlanHead:
    """Return a head with a fresh random plan id.

    Args:
        number: Number of the plan.
        facts: The other attributes of `PlanHead`.
    """
    return PlanHead(plan=secrets.token_hex(8), number=number, **facts)


def read_current_head(store: Store) -> tuple[int, PlanHead | None]:
    """Return the number of the plan that is not discarded, and its head; None if no head is written yet.

    Raises:
        InvalidJob: The head is damaged, or the plan has a format that this version does not know; a discarded plan may
            have any format.
    """
    number = 0
    while (stored := read_if_present(store, _head_key(number))) is not None:
        if read_if_present(store, _tombstone_key(number)) is None:
            return number, _parse_head(stored.data, store, number)
        number += 1
    return number, None


def put_head(store: Store, head: PlanHead, delete_stale_parts: Callable[[list[str]], None] | None = None) -> PlanHead:
    """Store a plan's head while `predictions/` is empty; return the stored one, which may be another driver's.

    Args:
        store: Output of the job.
        head: Head of the plan.
        delete_stale_parts: Deletes parts that lie there without a plan, given their keys; raises InvalidJob for a part
            that no discarded plan has left. None raises InvalidJob for every part.

    Raises:
        InvalidJob: Parts lie there without a plan.
    """
    key = _head_key(head.number)
    parts = [found.uri for found in store.list("predictions/") if not is_stray_key(found.uri)]
    # If there is a head, another driver has begun meanwhile, and the parts are its own.
    if parts and read_if_present(store, key) is None:
        if delete_stale_parts is None:
            raise InvalidJob(
                f"{store.uri}: {parts[0]} is there but no plan is; output.uri must be empty or hold this job's own "
                "output: choose another folder, or remove it"
            )
        delete_stale_parts(parts)
    return _parse_head(put_or_get(store, key, json.dumps(asdict(head), indent=1).encode()), store, head.number)


def discard_plan(store: Store, head: PlanHead) -> None:
    """Write the tombstone of a plan: from now on no worker commits a part of it."""
    put_or_get(store, _tombstone_key(head.number), b"{}\n")


def is_discarded(store: Store, head: PlanHead) -> bool:
    """Return True if the plan has a tombstone."""
    return read_if_present(store, _tombstone_key(head.number)) is not None


def is_plan_id_discarded(store: Store, plan_id: str) -> bool:
    """Return True if a discarded plan of this output has the id."""
    number = 0
    while (stored := read_if_present(store, _head_key(number))) is not None:
        if _parse_json(stored.data, store, number)["plan"] == plan_id:
            return read_if_present(store, _tombstone_key(number)) is not None
        number += 1
    return False


@contextmanager
def report_damage(store: Store, key: str) -> Iterator[None]:
    """Raise each error of parsing an object of the plan as an InvalidJob that names the object."""
    try:
        yield
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InvalidJob(
            f"{store.uri}/{key} is damaged ({reason}); put it back as it was, or `batchjob discard {store.uri} --yes` "
            "and run again"
        ) from error


def _parse_head(data: bytes, store: Store, number: int) -> PlanHead:
    facts = _parse_json(data, store, number)
    if facts.get("format") != FORMAT_VERSION:
        raise InvalidJob(
            f"{store.uri}: its plan has format {facts.get('format')}, this version knows {FORMAT_VERSION}; "
            f"finish it with batchjob {facts.get('batchjob')}"
        )
    try:
        return PlanHead(**facts)
    except TypeError as error:
        raise _damaged_head_error(store, number, error) from error


def _parse_json(data: bytes, store: Store, number: int) -> dict[str, Any]:
    try:
        facts = json.loads(data)
        if not isinstance(facts, dict) or "plan" not in facts:
            raise ValueError("it names no plan")
    except ValueError as error:
        raise _damaged_head_error(store, number, error) from error
    return facts


def _damaged_head_error(store: Store, number: int, error: Exception) -> InvalidJob:
    return InvalidJob(
        f"{store.uri}/{_head_key(number)} is damaged ({error}); put it back as it was, or choose another output.uri"
    )


def _plan_folder(number: int) -> str:
    return f"_batchjob/plans/{number:04d}/"


def _head_key(number: int) -> str:
    return f"{_plan_folder(number)}head.json"


def _tombstone_key(number: int) -> str:
    return f"{_plan_folder(number)}discarded"
