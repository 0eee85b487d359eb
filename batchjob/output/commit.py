"""Commit protocol: one conditional PUT creates or replaces a part; the footers say which parts are committed."""

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
from batchjob.output.success import SUCCESS
from batchjob.storage.objects import ObjectInfo
from batchjob.storage.store import Store
from batchjob.types import ShardKey, is_stray_key

__all__ = [
    "CommitResult",
    "check_owner",
    "commit_part",
    "commit_replacement",
    "delete_objects",
    "list_parts",
    "read_footer",
    "read_footers",
]

_TAIL_BYTES = 1 << 16
_MAX_PUTS = 4


@dataclass(frozen=True)
class CommitResult:
    """Result of a commit.

    Attributes:
        info: Size, ETag and version of the committed part.
        footer: Footer of the committed part.
        committed_here: False if another attempt had committed the part first.
    """

    info: ObjectInfo
    footer: PartFooter
    committed_here: bool


# An example of the protocol: the answer to a PUT is lost.
#
#     put_if_absent(part)      the object is stored, the connection breaks
#     put_if_absent(part)      the client's own repetition: "already exists"
#     read_footer(part)        plan and shard are ours, and so is the attempt: committed here
#
# With another attempt's id in the footer, that attempt was faster and its part is as good. With another plan or shard,
# somebody else writes to this output: CheckFailed. With no object at all, the PUT is tried again.
def commit_part(
    store: Store, key: ShardKey, path: Path, footer: PartFooter, raise_if_discarded: Callable[[], None]
) -> CommitResult:
    """Commit a part with one create-if-absent PUT. An answer other than success is never believed: the store is read.

    Args:
        store: Store of the output.
        key: Key of the shard.
        path: Local file with the part.
        footer: Footer in that file.
        raise_if_discarded: Raises if the plan has been discarded. Called before each PUT, and again once the part is
            there, because a process can be suspended in between for as long as a discard takes; then the part is
            deleted again.

    Raises:
        CheckFailed: Another object has the part's name.
        AttemptFailed: The store answered "already exists" each time, and there is no object.
        Unavailable: The store cannot be reached.
    """
    last_error: Exception | None = None
    for _ in range(_MAX_PUTS):
        raise_if_discarded()
        try:
            info = store.put_if_absent(key.part_key, path)
        except (AlreadyExists, Unavailable) as error:
            last_error = error
        else:
            return _keep_unless_discarded(
                store, key, CommitResult(info, footer, committed_here=True), raise_if_discarded
            )
        try:
            found, info = read_footer(store, key.part_key), store.stat(key.part_key)
        except NotFound:
            continue  # a 409 although nothing is stored, or a PUT that never arrived
        check_owner(store, key, found, footer)
        result = CommitResult(info, found, committed_here=found.attempt == footer.attempt)
        return _keep_unless_discarded(store, key, result, raise_if_discarded)
    if isinstance(last_error, Unavailable):
        raise last_error
    raise AttemptFailed(
        f"{store.uri}/{key.part_key}: the store answers 'exists' to each of {_MAX_PUTS} PUTs and shows nothing; "
        "run again"
    )


def commit_replacement(
    store: Store, key: ShardKey, path: Path, footer: PartFooter, version: str, raise_if_discarded: Callable[[], None]
) -> CommitResult:
    """Replace an older revision of a part, on condition of the version that was read.

    After an answer other than success, the part counts as committed if its revision is there, even by another attempt.

    Args:
        store: Store of the output.
        key: Key of the shard.
        path: Local file with the part.
        footer: Footer in that file; its revision is the new one.
        version: Version of the older revision, as it was read.
        raise_if_discarded: Raises if the plan has been discarded. Called before each PUT. A part that a discard has
            deleted is not written again.

    Raises:
        CheckFailed: Another object has the part's name.
        AttemptFailed: The older revision is gone, or was changed meanwhile.
        Temporary: There is a `_SUCCESS`: the driver that wrote it did not wait for this part.
        Unavailable: The store cannot be reached.
    """
    last_error: Exception | None = None
    for _ in range(_MAX_PUTS):
        _raise_if_finished(store)
        raise_if_discarded()
        try:
            return CommitResult(store.replace_if_match(key.part_key, path, version), footer, committed_here=True)
        except (PreconditionFailed, Unavailable) as error:
            last_error = error
        try:
            found, info = read_footer(store, key.part_key), store.stat(key.part_key)
        except NotFound as error:
            raise_if_discarded()
            raise AttemptFailed(f"{store.uri}/{key.part_key} is gone; run again to make it anew") from error
        check_owner(store, key, found, footer)
        if found.revision >= footer.revision:
            return CommitResult(info, found, committed_here=found.attempt == footer.attempt)
        if info.version != version:
            raise AttemptFailed(f"{store.uri}/{key.part_key} was changed while it was being retried; run again")
    if isinstance(last_error, Unavailable):
        raise last_error
    raise AttemptFailed(
        f"{store.uri}/{key.part_key}: the store refuses each of {_MAX_PUTS} PUTs and shows no other writer; run again"
    )


def check_owner(store: Store, key: ShardKey, found: PartFooter, expected: PartFooter) -> None:
    """Check that a part belongs to the expected plan and shard.

    Raises:
        CheckFailed: It does not.
    """
    if (found.plan, found.shard) != (expected.plan, expected.shard):
        raise CheckFailed(
            f"{store.uri}/{key.part_key} holds shard {found.shard} of plan {found.plan}, not {expected.shard} of "
            f"{expected.plan}: someone else writes here; find out who before running again"
        )


def list_parts(store: Store) -> dict[str, ObjectInfo]:
    """List the objects in `predictions/`, by key, without stray files."""
    return {info.uri: info for info in store.list("predictions/") if not is_stray_key(info.uri)}


def read_footer(store: Store, key: str) -> PartFooter:
    """Read the footer of a part: the last 64 KiB of the object, and more only where the footer is longer.

    Raises:
        NotFound: There is no such part.
        CheckFailed: The object was not written by batchjob.
    """
    tail = store.read_tail(key, _TAIL_BYTES)
    try:
        # Parquet ends with the length of its metadata (4 bytes, little endian) and the magic number "PAR1".
        if tail[-4:] != b"PAR1":
            raise ValueError("no Parquet file")
        needed = int.from_bytes(tail[-8:-4], "little") + 8
        if needed > len(tail):
            tail = store.read_tail(key, needed)
        metadata = pq.read_metadata(pa.BufferReader(tail)).metadata or {}
        return PartFooter.from_json(metadata[PartFooter.KEY.encode()])
    except (pa.ArrowException, KeyError, ValueError, TypeError, OSError) as error:
        raise CheckFailed(f"{store.uri}/{key} was not written by batchjob ({error}); remove it from there") from error


def read_footers(
    store: Store, keys: Iterable[str], heartbeat: Callable[[], object] = lambda: None
) -> Iterator[tuple[str, PartFooter]]:
    """Read the footers of many parts concurrently, in the order of `keys`.

    Args:
        store: Store of the output.
        keys: Keys of the parts.
        heartbeat: Called all the while.

    Raises:
        NotFound: There is no such part.
        CheckFailed: An object was not written by batchjob.
    """
    return parallel_map(lambda key: (key, read_footer(store, key)), keys, heartbeat)


def delete_objects(store: Store, keys: Iterable[str], heartbeat: Callable[[], object] = lambda: None) -> int:
    """Delete objects concurrently.

    Args:
        store: Store of the output.
        keys: Keys of the objects.
        heartbeat: Called all the while.

    Returns:
        How many there were.

    Raises:
        Unavailable: The store cannot be reached.
    """
    return sum(1 for _ in parallel_map(store.delete, keys, heartbeat))


def _keep_unless_discarded(
    store: Store, key: ShardKey, result: CommitResult, raise_if_discarded: Callable[[], None]
) -> CommitResult:
    """Return the result; if the plan has been discarded, delete the part and raise."""
    try:
        raise_if_discarded()
    except Unavailable:
        pass  # the next driver deletes a part of a discarded plan
    except BatchjobError:
        store.delete(key.part_key)
        raise
    return result


def _raise_if_finished(store: Store) -> None:
    """Raise Temporary if there is a `_SUCCESS`: the parts that it lists must not change."""
    try:
        store.stat(SUCCESS)
    except NotFound:
        return
    raise Temporary(f"{store.uri}: another driver has finished it meanwhile; retry again for what is still failed")
