"""What is committed: the one PUT that commits or replaces a part, the look after a doubtful answer, `_SUCCESS`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchjob.concurrency import parallel_map
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
from batchjob.output.provenance import PartFooter
from batchjob.storage.objects import ObjectInfo
from batchjob.storage.store import Store
from batchjob.types import ShardKey

__all__ = [
    "SUCCESS",
    "CommitResult",
    "check_owner",
    "commit_part",
    "commit_replacement",
    "delete_objects",
    "list_parts",
    "read_footer",
    "read_footers",
]

SUCCESS = "_SUCCESS"
_FOOTER_BYTES = 1 << 16
_LOOKS = 4


@dataclass(frozen=True)
class CommitResult:
    """How a commit ended: the part that stands, and whether it is this attempt's."""

    info: ObjectInfo
    footer: PartFooter
    ours: bool


def commit_part(
    store: Store, key: ShardKey, path: Path, footer: PartFooter, raise_if_discarded: Callable[[], None]
) -> CommitResult:
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
        raise_if_discarded()
        try:
            stat = store.put_if_absent(key.part_key, path)
        except (AlreadyExists, Unavailable) as error:
            doubt = error
        else:
            return _kept(store, key, CommitResult(stat, footer, ours=True), raise_if_discarded)
        try:
            found, stat = read_footer(store, key.part_key), store.stat(key.part_key)
        except NotFound:
            continue  # a 409 with nothing stored, or a PUT that never arrived
        check_owner(store, key, found, footer)
        return _kept(store, key, CommitResult(stat, found, ours=found.attempt == footer.attempt), raise_if_discarded)
    if isinstance(doubt, Unavailable):
        raise doubt
    raise AttemptFailed(
        f"{store.uri}/{key.part_key}: the store answers 'exists' to each of {_LOOKS} PUTs and shows nothing; run again"
    )


def _kept(store: Store, key: ShardKey, made: CommitResult, wanted: Callable[[], None]) -> CommitResult:
    """The same; the part of a plan that is discarded by now is deleted, and what `wanted` raises is raised."""
    try:
        wanted()
    except Unavailable:
        pass  # whoever meets such a part deletes it
    except BatchjobError:
        store.delete(key.part_key)
        raise
    return made


def commit_replacement(
    store: Store, key: ShardKey, path: Path, footer: PartFooter, version: str, raise_if_discarded: Callable[[], None]
) -> CommitResult:
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
        raise_if_discarded()
        try:
            return CommitResult(store.replace_if_match(key.part_key, path, version), footer, ours=True)
        except (PreconditionFailed, Unavailable) as error:
            doubt = error
        try:
            found, stat = read_footer(store, key.part_key), store.stat(key.part_key)
        except NotFound as error:
            raise_if_discarded()
            raise AttemptFailed(f"{store.uri}/{key.part_key} is gone; run again to make it anew") from error
        check_owner(store, key, found, footer)
        if found.revision >= footer.revision:
            return CommitResult(stat, found, ours=found.attempt == footer.attempt)
        if stat.version != version:
            raise AttemptFailed(f"{store.uri}/{key.part_key} was changed while it was being retried; run again")
    if isinstance(doubt, Unavailable):
        raise doubt
    raise AttemptFailed(
        f"{store.uri}/{key.part_key}: the store refuses each of {_LOOKS} PUTs and shows no other writer; run again"
    )


def _check_open(store: Store) -> None:
    """Raises Temporary where `_SUCCESS` stands, and with it the parts that it lists."""
    try:
        store.stat(SUCCESS)
    except NotFound:
        return
    raise Temporary(f"{store.uri}: another driver has finished it meanwhile; retry again for what is still failed")


def check_owner(store: Store, key: ShardKey, found: PartFooter, expected: PartFooter) -> None:
    """Raises CheckFailed where the part that was found is not of this plan and shard."""
    if (found.plan, found.shard) != (expected.plan, expected.shard):
        raise CheckFailed(
            f"{store.uri}/{key.part_key} holds shard {found.shard} of plan {found.plan}, not {expected.shard} of "
            f"{expected.plan}: someone else writes here; find out who before running again"
        )


def read_footer(store: Store, key: str) -> PartFooter:
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
        return PartFooter.from_json(metadata[PartFooter.KEY.encode()])
    except (pa.ArrowException, KeyError, ValueError, TypeError, OSError) as error:
        raise CheckFailed(f"{store.uri}/{key} was not written by batchjob ({error}); remove it from there") from error


def list_parts(store: Store) -> dict[str, ObjectInfo]:
    """What lies in `predictions/`, by key."""
    return {stat.uri: stat for stat in store.list("predictions/")}


def read_footers(
    store: Store, keys: Iterable[str], heartbeat: Callable[[], object] = lambda: None
) -> Iterator[tuple[str, PartFooter]]:
    """Footers of many parts, read side by side, in the order asked; `meanwhile` is called all along. See `inspect`."""
    return parallel_map(lambda key: (key, read_footer(store, key)), keys, heartbeat)


def delete_objects(store: Store, keys: Iterable[str], heartbeat: Callable[[], object] = lambda: None) -> int:
    """Delete objects side by side, calling `meanwhile` all along; how many there were. Raises Unavailable."""
    return sum(1 for _ in parallel_map(store.delete, keys, heartbeat))
