"""`_SUCCESS` and `report.json`: read, written and deleted by conditional requests."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from batchjob.errors import (
    AlreadyExists,
    BatchjobError,
    CheckFailed,
    NotFound,
    PreconditionFailed,
    Temporary,
    Unavailable,
)
from batchjob.output.provenance import PartFooter
from batchjob.storage.objects import ObjectInfo
from batchjob.storage.store import Store, read_if_present

__all__ = [
    "SUCCESS",
    "Part",
    "Totals",
    "delete_orphaned_success",
    "delete_success",
    "read_accepted_failures",
    "read_success",
    "record_acceptance",
    "write_report",
    "write_success",
]

SUCCESS = "_SUCCESS"
_REPORT = "_batchjob/report.json"
_ACCEPTED = "_batchjob/accepted.json"
_MAX_TRIES = 4


@dataclass(frozen=True)
class Part:
    """A committed part, as `_SUCCESS` lists it.

    Attributes:
        name: Key of the part, relative to the output.
        rows: Rows in it.
        failed: Error rows among them.
        etag: ETag of the object; None where the store has none.
        size: Size of the object in bytes.
        attempt: Id of the attempt that wrote it, from its footer; None in outputs of earlier versions.
    """

    name: str
    rows: int
    failed: int
    etag: str | None
    size: int
    attempt: str | None = None


@dataclass
class Totals:
    """Running sums over committed parts.

    Attributes:
        rows: Rows.
        failed: Error rows.
        errors: Error rows by `stage/type`.
        examples: One `uri: message` for each `stage/type`.
        seconds: Seconds by stage.
        truth: Sums for the task's metrics.
        execution_configs: Rows by execution config.
    """

    rows: int = 0
    failed: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    truth: dict[str, float] = field(default_factory=dict)
    execution_configs: Counter[str] = field(default_factory=Counter)

    def add(self, footer: PartFooter) -> None:
        """Add one part."""
        self.rows += footer.rows
        self.failed += footer.failed
        self.errors.update(footer.errors)
        self.execution_configs[footer.recipe or "not recorded"] += footer.rows
        for sums, amounts in ((self.seconds, footer.seconds), (self.truth, footer.truth)):
            for name, amount in amounts.items():
                sums[name] = sums.get(name, 0) + amount


def read_success(store: Store) -> tuple[dict[str, Any], ObjectInfo] | None:
    """Read `_SUCCESS`.

    Returns:
        Its JSON object and its version; None if there is no `_SUCCESS`.

    Raises:
        CheckFailed: The object was not written by batchjob.
    """
    if (stored := read_if_present(store, SUCCESS)) is None:
        return None
    try:
        success = json.loads(stored.data)
        if not isinstance(success, dict) or not isinstance(success.get("counts", {}), dict):
            raise ValueError("no JSON object with counts")
        for part in success.get("parts", []):
            part["name"], part["etag"]
    except (ValueError, LookupError, TypeError) as error:
        raise CheckFailed(f"{store.uri}/{SUCCESS} is not batchjob's: {error}; remove it and run again") from error
    return success, ObjectInfo(SUCCESS, len(stored.data), stored.etag, stored.version)


def delete_success(store: Store, version: str) -> None:
    """Delete `_SUCCESS` in the version that was read; from now on readers wait.

    Raises:
        Temporary: Another driver has written a new one meanwhile.
    """
    try:
        store.delete_if_match(SUCCESS, version)
    except PreconditionFailed as error:
        # If it is gone, our own request deleted it and the answer was lost.
        if read_success(store) is not None:
            raise Temporary(f"{store.uri}: another driver has finished it meanwhile; retry again") from error


def delete_orphaned_success(store: Store, is_orphaned: Callable[[], bool]) -> None:
    """Delete `_SUCCESS` if it belongs to no current plan.

    Args:
        store: Store of the output.
        is_orphaned: Returns True if there is no current plan. Called after the version of `_SUCCESS` was read, so that
            one which is written later stays.
    """
    try:
        version = store.stat(SUCCESS).version or ""
    except NotFound:
        return
    if is_orphaned():
        with suppress(PreconditionFailed):
            store.delete_if_match(SUCCESS, version)


def write_success(
    store: Store,
    summary: Mapping[str, Any],
    committed_parts: Iterable[Part],
    raise_if_discarded: Callable[[], None] = lambda: None,
) -> None:
    """Write `_SUCCESS`. One that is there and differs is replaced, on condition of its version.

    Args:
        store: Store of the output.
        summary: JSON object to write; `plan` is in it.
        committed_parts: Parts to list in it.
        raise_if_discarded: Raises if the plan has been discarded. Called before each PUT and after the last one; then
            `_SUCCESS` is deleted again.
    """
    body = json.dumps({**summary, "parts": [asdict(part) for part in committed_parts]}, indent=1).encode()
    _put_or_replace(store, SUCCESS, body, raise_if_discarded)
    try:
        raise_if_discarded()
    except Unavailable:
        pass  # the driver of the next plan deletes it
    except BatchjobError:
        if (written := read_success(store)) is not None and written[0].get("plan") == summary["plan"]:
            with suppress(PreconditionFailed):
                store.delete_if_match(SUCCESS, written[1].version or "")
        raise


def record_acceptance(store: Store, success: Mapping[str, Any]) -> None:
    """Keep the number of error rows with which an output was complete, before its `_SUCCESS` is deleted.

    A retry never adds an error row, so that what was accepted under a larger error budget stays accepted. Example:

        run        3 of 10 images fail, errors.max_rate is 0.5        `_SUCCESS` with failed: 3
        retry      accepted.json gets failed: 3, `_SUCCESS` goes      killed
        run        3 have failed, errors.max_rate is 0.01             accepted: `_SUCCESS` again
    """
    accepted = {"plan": success["plan"], "failed": success["counts"]["failed"]}
    _put_or_replace(store, _ACCEPTED, json.dumps(accepted).encode())


def read_accepted_failures(store: Store, plan_id: str) -> int | None:
    """Return the number of error rows with which the plan's output was complete once; None if it never was."""
    try:
        accepted = json.loads(store.read(_ACCEPTED).data)
        return int(accepted["failed"]) if accepted["plan"] == plan_id else None
    except (NotFound, ValueError, LookupError, TypeError):
        return None


def write_report(store: Store, report: Mapping[str, Any]) -> None:
    """Write `_batchjob/report.json`, replacing an older one."""
    _put_or_replace(store, _REPORT, json.dumps(report, indent=1).encode())


def _put_or_replace(store: Store, key: str, body: bytes, raise_if_discarded: Callable[[], None] = lambda: None) -> None:
    for _ in range(_MAX_TRIES):
        raise_if_discarded()
        try:
            store.put_if_absent(key, body)
            return
        except AlreadyExists:
            pass
        try:
            existing = store.read(key)
            if existing.data == body:
                return
            raise_if_discarded()
            store.replace_if_match(key, body, existing.version or "")
            return
        except (NotFound, PreconditionFailed):
            continue
    raise Temporary(f"{store.uri}/{key} could not be written: it changes under every try; run again")
