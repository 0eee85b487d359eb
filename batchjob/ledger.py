"""What is committed: the one PUT that commits or replaces a part, the look after a doubtful answer, `_SUCCESS`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchjob.errors import (
    AlreadyExists,
    AttemptFailed,
    BatchjobError,
    Changed,
    CheckFailed,
    NotFound,
    Temporary,
    Unavailable,
)
from batchjob.parallel import side_by_side
from batchjob.records import Provenance, ShardKey, Stat
from batchjob.storage import Store

__all__ = [
    "SUCCESS",
    "Commit",
    "Part",
    "Totals",
    "check_owner",
    "clear_success",
    "commit",
    "damaged",
    "delete_all",
    "error_positions",
    "error_rows",
    "inspect",
    "inspect_all",
    "missing_from_success",
    "parts",
    "read_success",
    "replace",
    "withdraw_success",
    "write_report",
    "write_success",
]

SUCCESS = "_SUCCESS"
_REPORT = "_batchjob/report.json"
_FOOTER_BYTES = 1 << 16
_LOOKS = 4
_ERROR_COLUMNS = ["position", "uri", "error_stage", "error_type", "error_message"]


@dataclass(frozen=True)
class Commit:
    """How a commit ended: the part that stands, and whether it is this attempt's."""

    stat: Stat
    provenance: Provenance
    ours: bool


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
    recipes: Counter[str] = field(default_factory=Counter)

    def add(self, made: Provenance) -> None:
        """Count one part."""
        self.rows += made.rows
        self.failed += made.failed
        self.errors.update(made.errors)
        self.recipes[made.recipe or "not recorded"] += made.rows
        for sums, more in ((self.seconds, made.seconds), (self.truth, made.truth)):
            for name, amount in more.items():
                sums[name] = sums.get(name, 0) + amount


def commit(store: Store, key: ShardKey, path: Path, provenance: Provenance, wanted: Callable[[], None]) -> Commit:
    """Make the part at `path` the shard's: one create-if-absent PUT, and a look whenever the answer is in doubt.

    Args:
        wanted: raises when the plan has been discarded; asked before each PUT, and once the part stands: a process may
            have been stopped in between for as long as a discard takes. Then the part is taken back.

    Raises:
        CheckFailed: something else lies under the part's name.
        AttemptFailed: the store said "exists" again and again with nothing there.
        Unavailable: the store cannot be reached.
    """
    doubt: Exception | None = None
    for _ in range(_LOOKS):
        wanted()
        try:
            stat = store.put_if_absent(key.part, path)
        except (AlreadyExists, Unavailable) as error:
            doubt = error
        else:
            return _kept(store, key, Commit(stat, provenance, ours=True), wanted)
        try:
            found, stat = inspect(store, key.part), store.stat(key.part)
        except NotFound:
            continue  # a 409 with nothing stored, or a PUT that never arrived
        check_owner(store, key, found, provenance)
        return _kept(store, key, Commit(stat, found, ours=found.attempt == provenance.attempt), wanted)
    if isinstance(doubt, Unavailable):
        raise doubt
    raise AttemptFailed(
        f"{store.uri}/{key.part}: the store answers 'exists' to each of {_LOOKS} PUTs and shows nothing; run again"
    )


def _kept(store: Store, key: ShardKey, made: Commit, wanted: Callable[[], None]) -> Commit:
    """The same; the part of a plan that is discarded by now is deleted, and what `wanted` raises is raised."""
    try:
        wanted()
    except Unavailable:
        pass  # whoever meets such a part deletes it
    except BatchjobError:
        store.delete(key.part)
        raise
    return made


def replace(
    store: Store, key: ShardKey, path: Path, provenance: Provenance, version: str, wanted: Callable[[], None]
) -> Commit:
    """Put the part at `path` in place of an older revision: only that very version of it is replaced.

    After a doubtful answer the part is there if its revision is, be it this attempt's or a rival's.

    Args:
        version: of the older revision, as it was read.
        wanted: raises when the plan has been discarded; asked before each PUT. A part that a discard has deleted is not
            put anew.

    Raises:
        CheckFailed: something else lies under the part's name.
        AttemptFailed: the older revision is gone, or was changed meanwhile.
        Temporary: `_SUCCESS` stands: whoever put it has not waited for this part.
        Unavailable: the store cannot be reached.
    """
    doubt: Exception | None = None
    for _ in range(_LOOKS):
        _check_open(store)
        wanted()
        try:
            return Commit(store.replace_if_match(key.part, path, version), provenance, ours=True)
        except (Changed, Unavailable) as error:
            doubt = error
        try:
            found, stat = inspect(store, key.part), store.stat(key.part)
        except NotFound as error:
            wanted()
            raise AttemptFailed(f"{store.uri}/{key.part} is gone; run again to make it anew") from error
        check_owner(store, key, found, provenance)
        if found.revision >= provenance.revision:
            return Commit(stat, found, ours=found.attempt == provenance.attempt)
        if stat.version != version:
            raise AttemptFailed(f"{store.uri}/{key.part} was changed while it was being retried; run again")
    if isinstance(doubt, Unavailable):
        raise doubt
    raise AttemptFailed(
        f"{store.uri}/{key.part}: the store refuses each of {_LOOKS} PUTs and shows no other writer; run again"
    )


def _check_open(store: Store) -> None:
    """Raises Temporary where `_SUCCESS` stands, and with it the parts that it lists."""
    try:
        store.stat(SUCCESS)
    except NotFound:
        return
    raise Temporary(f"{store.uri}: another driver has finished it meanwhile; retry again for what is still failed")


def check_owner(store: Store, key: ShardKey, found: Provenance, wanted: Provenance) -> None:
    """Raises CheckFailed where the part that was found is not of this plan and shard."""
    if (found.plan, found.shard) != (wanted.plan, wanted.shard):
        raise CheckFailed(
            f"{store.uri}/{key.part} holds shard {found.shard} of plan {found.plan}, not {wanted.shard} of "
            f"{wanted.plan}: someone else writes here; find out who before running again"
        )


def inspect(store: Store, key: str) -> Provenance:
    """The provenance in a part's footer.

    Raises:
        NotFound: there is no such part.
        CheckFailed: it is no part of ours.
    """
    tail = store.read_tail(key, _FOOTER_BYTES)
    try:
        if tail[-4:] != b"PAR1":
            raise ValueError("no Parquet file")
        needed = int.from_bytes(tail[-8:-4], "little") + 8
        if needed > len(tail):
            tail = store.read_tail(key, needed)
        metadata = pq.read_metadata(pa.BufferReader(tail)).metadata or {}
        return Provenance.parse(metadata[Provenance.KEY.encode()])
    except (pa.ArrowException, KeyError, ValueError, TypeError, OSError) as error:
        raise CheckFailed(f"{store.uri}/{key} was not written by batchjob ({error}); remove it from there") from error


def parts(store: Store) -> dict[str, Stat]:
    """What lies in `predictions/`, by key."""
    return {stat.uri: stat for stat in store.list("predictions/")}


def inspect_all(
    store: Store, keys: Iterable[str], meanwhile: Callable[[], object] = lambda: None
) -> Iterator[tuple[str, Provenance]]:
    """Footers of many parts, read side by side, in the order asked; `meanwhile` is called all along. See `inspect`."""
    return side_by_side(lambda key: (key, inspect(store, key)), keys, meanwhile)


def delete_all(store: Store, keys: Iterable[str], meanwhile: Callable[[], object] = lambda: None) -> int:
    """Delete objects side by side, calling `meanwhile` all along; how many there were. Raises Unavailable."""
    return sum(1 for _ in side_by_side(store.delete, keys, meanwhile))


def read_success(store: Store) -> tuple[dict[str, Any], Stat] | None:
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
    return facts, Stat(SUCCESS, len(blob.data), blob.etag, blob.version)


def withdraw_success(store: Store, version: str) -> None:
    """Delete `_SUCCESS` as it was read: from now on readers wait.

    Raises:
        Temporary: another driver has put another one meanwhile.
    """
    try:
        store.delete_if_match(SUCCESS, version)
    except Changed as error:
        if read_success(store) is not None:  # else it was ours that deleted it, and the answer was lost
            raise Temporary(f"{store.uri}: another driver has finished it meanwhile; retry again") from error


def clear_success(store: Store, orphaned: Callable[[], bool]) -> None:
    """Delete `_SUCCESS` where it belongs to no plan in force.

    Args:
        orphaned: whether that is so; asked after the look at it, so that one which is put later stays.
    """
    try:
        version = store.stat(SUCCESS).version or ""
    except NotFound:
        return
    if orphaned():
        with suppress(Changed):
            store.delete_if_match(SUCCESS, version)


def write_success(
    store: Store, facts: Mapping[str, Any], found: Iterable[Part], wanted: Callable[[], None] = lambda: None
) -> None:
    """Put `_SUCCESS`; one that is there and says something else is replaced under its version.

    Args:
        facts: what it says, `plan` among it.
        found: the parts that it lists.
        wanted: raises when the plan has been discarded; asked before each PUT, and afterwards: then it is taken back.
    """
    body = json.dumps({**facts, "parts": [asdict(part) for part in found]}, indent=1).encode()
    _put_or_replace(store, SUCCESS, body, wanted)
    try:
        wanted()
    except Unavailable:
        pass  # the next plan's driver deletes it
    except BatchjobError:
        if (stands := read_success(store)) is not None and stands[0].get("plan") == facts["plan"]:
            with suppress(Changed):
                store.delete_if_match(SUCCESS, stands[1].version or "")
        raise


def write_report(store: Store, facts: Mapping[str, Any]) -> None:
    """Put `_batchjob/report.json`, in place of an older one."""
    _put_or_replace(store, _REPORT, json.dumps(facts, indent=1).encode())


def missing_from_success(success: Mapping[str, Any], found: Mapping[str, Stat]) -> list[str]:
    """Parts that `_SUCCESS` lists and that are gone, changed, or there without being listed."""
    listed = {part["name"]: part["etag"] for part in success["parts"]}
    present = {name: stat.etag for name, stat in found.items()}
    return sorted(name for name in listed.keys() | present.keys() if listed.get(name, "") != present.get(name, ""))


def error_rows(store: Store) -> Iterator[dict[str, Any]]:
    """Error rows as dicts (`position, uri, error_stage, error_type, error_message`), in plan order.

    Reads the footers, and of parts with errors these columns alone.
    """
    for key, provenance in inspect_all(store, sorted(parts(store))):
        if not provenance.failed:
            continue
        yield from _error_rows(store, key, _ERROR_COLUMNS).to_pylist()


def error_positions(store: Store, key: str) -> frozenset[int]:
    """Positions of a part's error rows. Raises NotFound, CheckFailed."""
    return frozenset(_error_rows(store, key, ["position"]).column("position").to_pylist())


def damaged(store: Store, key: str, error: Exception) -> CheckFailed:
    """What is said of a part whose footer is ours and whose rows cannot be read."""
    reason = " ".join(str(error).split())[:200]
    return CheckFailed(f"{store.uri}/{key} is damaged ({reason}); remove it and run with --repair")


def _error_rows(store: Store, key: str, columns: list[str]) -> pa.Table:
    try:
        with store.open(key) as file:
            return pq.read_table(file, columns=columns, filters=[("error_stage", "!=", "")])
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(store, key, error) from error


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
        except (NotFound, Changed):
            continue
    raise AttemptFailed(f"{store.uri}/{key} could not be written: it changes under every try; run again")
