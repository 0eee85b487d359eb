"""What is committed: the one PUT that commits or replaces a part, the look after a doubtful answer, `_SUCCESS`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchjob.concurrency import side_by_side
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
from batchjob.output.provenance import Provenance
from batchjob.storage.objects import Stat
from batchjob.storage.store import Store
from batchjob.types import ShardKey

__all__ = ["SUCCESS", "Commit", "check_owner", "commit", "delete_all", "inspect", "inspect_all", "parts", "replace"]

SUCCESS = "_SUCCESS"
_FOOTER_BYTES = 1 << 16
_LOOKS = 4


@dataclass(frozen=True)
class Commit:
    """How a commit ended: the part that stands, and whether it is this attempt's."""

    stat: Stat
    provenance: Provenance
    ours: bool


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
