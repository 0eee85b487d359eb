"""What is committed: the one PUT that commits or replaces a part, the look after a doubtful answer, `_SUCCESS`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from batchjob.errors import (
    AlreadyExists,
    AttemptFailed,
    BatchjobError,
    CheckFailed,
    NotFound,
    PreconditionFailed,
    Temporary,
    Unavailable,
)
from batchjob.output.commit import _LOOKS, SUCCESS
from batchjob.output.provenance import PartFooter
from batchjob.storage.objects import ObjectInfo
from batchjob.storage.store import Store

__all__ = [
    "Part",
    "Totals",
    "delete_orphaned_success",
    "delete_success",
    "find_part_mismatches",
    "read_success",
    "write_report",
    "write_success",
]

_REPORT = "_batchjob/report.json"


@dataclass(frozen=True)
class Part:
    """A committed part, as `_SUCCESS` lists it."""

    name: str
    rows: int
    failed: int
    etag: str | None
    size: int


@dataclass
class Totals:
    """Running sums over committed parts."""

    rows: int = 0
    failed: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    truth: dict[str, float] = field(default_factory=dict)
    execution_configs: Counter[str] = field(default_factory=Counter)

    def add(self, footer: PartFooter) -> None:
        """Count one part."""
        self.rows += footer.rows
        self.failed += footer.failed
        self.errors.update(footer.errors)
        self.execution_configs[footer.recipe or "not recorded"] += footer.rows
        for sums, more in ((self.seconds, footer.seconds), (self.truth, footer.truth)):
            for name, amount in more.items():
                sums[name] = sums.get(name, 0) + amount


def read_success(store: Store) -> tuple[dict[str, Any], ObjectInfo] | None:
    """`_SUCCESS` and its stat, None when it is not there."""
    try:
        blob = store.read(SUCCESS)
    except NotFound:
        return None
    try:
        facts = json.loads(blob.data)
        if not isinstance(facts, dict) or not isinstance(facts.get("counts", {}), dict):
            raise ValueError("no JSON object with counts")
        for part in facts.get("parts", []):
            part["name"], part["etag"]
    except (ValueError, LookupError, TypeError) as error:
        raise CheckFailed(f"{store.uri}/{SUCCESS} is not batchjob's: {error}; remove it and run again") from error
    return facts, ObjectInfo(SUCCESS, len(blob.data), blob.etag, blob.version)


def delete_success(store: Store, version: str) -> None:
    """Delete `_SUCCESS` as it was read: from now on readers wait.

    Raises:
        Temporary: another driver has put another one meanwhile.
    """
    try:
        store.delete_if_match(SUCCESS, version)
    except PreconditionFailed as error:
        if read_success(store) is not None:  # else it was ours that deleted it, and the answer was lost
            raise Temporary(f"{store.uri}: another driver has finished it meanwhile; retry again") from error


def delete_orphaned_success(store: Store, is_orphaned: Callable[[], bool]) -> None:
    """Delete `_SUCCESS` where it belongs to no plan in force.

    Args:
        orphaned: whether that is so; asked after the look at it, so that one which is put later stays.
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
    """Put `_SUCCESS`; one that is there and says something else is replaced under its version.

    Args:
        facts: what it says, `plan` among it.
        found: the parts that it lists.
        wanted: raises when the plan has been discarded; asked before each PUT, and afterwards: then it is taken back.
    """
    body = json.dumps({**summary, "parts": [asdict(part) for part in committed_parts]}, indent=1).encode()
    _put_or_replace(store, SUCCESS, body, raise_if_discarded)
    try:
        raise_if_discarded()
    except Unavailable:
        pass  # the next plan's driver deletes it
    except BatchjobError:
        if (stands := read_success(store)) is not None and stands[0].get("plan") == summary["plan"]:
            with suppress(PreconditionFailed):
                store.delete_if_match(SUCCESS, stands[1].version or "")
        raise


def write_report(store: Store, report: Mapping[str, Any]) -> None:
    """Put `_batchjob/report.json`, in place of an older one."""
    _put_or_replace(store, _REPORT, json.dumps(report, indent=1).encode())


def find_part_mismatches(success: Mapping[str, Any], listing: Mapping[str, ObjectInfo]) -> list[str]:
    """Parts that `_SUCCESS` lists and that are gone, changed, or there without being listed."""
    listed = {part["name"]: part["etag"] for part in success["parts"]}
    present = {name: stat.etag for name, stat in listing.items()}
    return sorted(name for name in listed.keys() | present.keys() if listed.get(name, "") != present.get(name, ""))


def _put_or_replace(store: Store, key: str, body: bytes, wanted: Callable[[], None] = lambda: None) -> None:
    for _ in range(_LOOKS):
        wanted()
        try:
            store.put_if_absent(key, body)
            return
        except AlreadyExists:
            pass
        try:
            there = store.read(key)
            if there.data == body:
                return
            wanted()
            store.replace_if_match(key, body, there.version or "")
            return
        except (NotFound, PreconditionFailed):
            continue
    raise AttemptFailed(f"{store.uri}/{key} could not be written: it changes under every try; run again")
