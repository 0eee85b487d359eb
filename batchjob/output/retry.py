"""A part made anew: its error rows tried again, all its other rows as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchjob.errors import AttemptFailed, CheckFailed, NotFound
from batchjob.output import commit, error_rows
from batchjob.output.commit import CommitResult
from batchjob.output.part_writer import PartWriter
from batchjob.output.provenance import PartFooter
from batchjob.storage.store import Store
from batchjob.types import ImageRef, Shard, ShardKey

__all__ = ["replace_part", "select_error_rows"]

_ROWS_AT_ONCE = 8192


def select_error_rows(store: Store, shard: Shard, max_bytes: int | None = None) -> Shard:
    """The shard cut down to the images whose rows hold an error, to be read as they are by now.

    There are none where the part has the revision already that is to be made: another attempt was quicker.

    Args:
        store: of the output.
        shard: with the revision that is to be made.
        limit: bytes that an image may have; a planned size over it says nothing of what lies there by now.

    Raises:
        AttemptFailed: the part is gone, or changed while it was looked at.
        CheckFailed: what lies there is no part of ours, or damaged.
    """
    key = shard.key
    with _steady(store, key):
        made = commit.read_footer(store, key.part_key)
        failed = (
            error_rows.read_error_positions(store, key.part_key) if made.revision < key.revision else frozenset[int]()
        )
    kept = [row for row, ref in enumerate(shard.refs) if ref.position in failed]
    refs = tuple(_untagged(shard.refs[row], max_bytes) for row in kept)
    return replace(shard, refs=refs, passthrough=shard.passthrough.take(kept))


def replace_part(
    store: Store, key: ShardKey, retried_rows: Path, footer: PartFooter, raise_if_discarded: Callable[[], None]
) -> tuple[CommitResult, dict[str, str]]:
    """Replace the shard's part by one in which the retried rows stand in the place of the error rows.

    Args:
        key: of the shard, with the revision that is to be made.
        retried: a local file of these rows, written as a part is; files beside it are made and removed.
        made: what its footer says.
        wanted: see `ledger.replace`.

    Returns:
        How it ended, and one example of each kind of error that is left.

    Raises:
        AttemptFailed: the part is gone, or its error rows are others than those that were retried.
        BatchjobError: see `ledger.replace`.
    """
    old, new = retried_rows.with_suffix(".old"), retried_rows.with_suffix(".new")
    try:
        version, stands = _fetched(store, key, old)
        commit.check_owner(store, key, stands, footer)
        if stands.revision >= key.revision:
            return CommitResult(store.stat(key.part_key), stands, ours=False), {}
        with PartWriter(new, pq.read_schema(retried_rows).remove_metadata()) as writer:
            for batch in _merged(store, key, old, pq.read_table(retried_rows)):
                writer.add(batch)
            whole = replace(
                footer,
                rows=writer.rows,
                failed=writer.failed,
                errors=dict(writer.errors),
                seconds=_summed(stands.seconds, footer.seconds),
                truth=_summed(stands.truth, footer.truth),
                recipe=_both(stands.recipe, footer.recipe),
            )
            if whole.rows != key.rows:
                raise AttemptFailed(
                    f"{store.uri}/{key.part_key} would have {whole.rows} rows, not {key.rows}; run again"
                )
            writer.close(whole)
        return commit.commit_replacement(store, key, new, whole, version, raise_if_discarded), writer.examples
    finally:
        for path in (old, new):
            with suppress(OSError):  # the spool is swept at the end
                path.unlink(missing_ok=True)


def _untagged(ref: ImageRef, limit: int | None) -> ImageRef:
    """Whatever lies there now; the planned size still tells how many are read at once."""
    known = ref.size is not None and (limit is None or ref.size <= limit)
    return replace(ref, size=ref.size if known else None, etag=None)


def _fetched(store: Store, key: ShardKey, path: Path) -> tuple[str, PartFooter]:
    """The part as it stands, read at once into a local file; its version and its footer."""
    try:
        blob = store.read(key.part_key)
    except NotFound as error:
        raise AttemptFailed(f"{store.uri}/{key.part_key} is gone; run again to make it anew") from error
    path.write_bytes(blob.data)
    try:
        stands = PartFooter.from_json((pq.read_metadata(path).metadata or {})[PartFooter.KEY.encode()])
    except (pa.ArrowException, KeyError, ValueError, TypeError) as error:
        raise error_rows.damaged_part_error(store, key.part_key, error) from error
    return blob.version or "", stands


def _merged(store: Store, key: ShardKey, old: Path, retried: pa.Table) -> Iterator[pa.RecordBatch]:
    """The rows of the old part in their order, the retried ones in place of those that hold an error."""
    taken = 0
    with pq.ParquetFile(old) as file:
        for batch in file.iter_batches(_ROWS_AT_ONCE):
            stages = batch.column("error_stage")
            again = retried.slice(taken, len(stages) - stages.null_count)
            taken += again.num_rows
            if again.column("position").to_pylist() != _positions(batch.filter(pc.is_valid(stages))):
                raise _other_rows(store, key)
            good = pa.Table.from_batches([batch.filter(pc.is_null(stages))])
            whole = pa.concat_tables([good, again.select(good.column_names)]).sort_by("position")
            yield from whole.replace_schema_metadata(None).combine_chunks().to_batches()
    if taken != retried.num_rows:
        raise _other_rows(store, key)


def _positions(batch: pa.RecordBatch) -> list[int]:
    found: list[int] = batch.column("position").to_pylist()
    return found


def _other_rows(store: Store, key: ShardKey) -> AttemptFailed:
    return AttemptFailed(f"{store.uri}/{key.part_key} holds other error rows than those that were retried; run again")


@contextmanager
def _steady(store: Store, key: ShardKey) -> Iterator[None]:
    """Around a look at several pieces of a part: what does not fit together may be of two versions of it.

    Raises:
        AttemptFailed: it is.
    """
    try:
        before = store.stat(key.part_key).version
        yield
    except NotFound as error:
        raise AttemptFailed(f"{store.uri}/{key.part_key} is gone; run again to make it anew") from error
    except CheckFailed as error:
        if store.stat(key.part_key).version != before:
            raise AttemptFailed(f"{store.uri}/{key.part_key} was changed while it was read; run again") from error
        raise


def _summed(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in (*one, *(other.keys() - one.keys()))}


def _both(first: str, then: str) -> str:
    """By which recipes the rows were made."""
    return first if then in first else f"{first}, retried by {then}"
