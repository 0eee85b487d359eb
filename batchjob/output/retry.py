"""Retry of a part: select its error rows, and replace the part by one with the retried rows in their places."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchjob.errors import AttemptFailed, CheckFailed, NotFound
from batchjob.output.commit import CommitResult, check_owner, commit_replacement, read_footer
from batchjob.output.error_rows import damaged_part_error, read_error_positions
from batchjob.output.part_writer import PartWriter
from batchjob.output.provenance import PartFooter
from batchjob.storage.store import Store
from batchjob.types import ImageRef, Shard, ShardKey

__all__ = ["replace_part", "select_error_rows"]

_ROWS_PER_BATCH = 8192


def select_error_rows(store: Store, shard: Shard, max_bytes: int | None = None) -> Shard:
    """Reduce a shard to the images with error rows, to be read in whatever version is there now.

    Args:
        store: Store of the output.
        shard: The whole shard; its key has the new revision.
        max_bytes: Limit on the size of an image; None for no limit. A planned size above it is dropped: the object may
            have been replaced by a smaller one.

    Returns:
        The shard with these images only; with none if the part has the new revision already, because another attempt
        was faster.

    Raises:
        AttemptFailed: The part is gone, or changed while it was read.
        CheckFailed: The part was not written by batchjob, or is damaged.
    """
    key = shard.key
    with _check_unchanged(store, key):
        footer = read_footer(store, key.part_key)
        is_older = footer.revision < key.revision
        positions = read_error_positions(store, key.part_key) if is_older else frozenset[int]()
    kept = [row for row, ref in enumerate(shard.refs) if ref.position in positions]
    refs = tuple(_without_version(shard.refs[row], max_bytes) for row in kept)
    return replace(shard, refs=refs, passthrough=shard.passthrough.take(kept))


def replace_part(
    store: Store, key: ShardKey, retried_rows: Path, footer: PartFooter, raise_if_discarded: Callable[[], None]
) -> tuple[CommitResult, dict[str, str]]:
    """Replace a part by one with the retried rows in place of its error rows.

    Args:
        store: Store of the output.
        key: Key of the shard, with the new revision.
        retried_rows: Local Parquet file with the retried rows. Files beside it are written and removed.
        footer: Footer of that file; counts and sums of the whole part are put in here.
        raise_if_discarded: See `commit_replacement`.

    Returns:
        The result of the commit, and one `uri: message` for each `stage/type` that is left.

    Raises:
        AttemptFailed: The part is gone, or its error rows are not those that were retried.
        BatchjobError: See `commit_replacement`.
    """
    old, new = retried_rows.with_suffix(".old"), retried_rows.with_suffix(".new")
    try:
        version, old_footer = _download_part(store, key, old)
        check_owner(store, key, old_footer, footer)
        if old_footer.revision >= key.revision:
            return CommitResult(store.stat(key.part_key), old_footer, committed_here=False), {}
        with PartWriter(new, pq.read_schema(retried_rows).remove_metadata()) as writer:
            for batch in _merge_rows(store, key, old, pq.read_table(retried_rows)):
                writer.add(batch)
            new_footer = replace(
                footer,
                rows=writer.rows,
                failed=writer.failed,
                errors=dict(writer.errors),
                seconds=_add_values(old_footer.seconds, footer.seconds),
                truth=_add_values(old_footer.truth, footer.truth),
                recipe=_join_configs(old_footer.recipe, footer.recipe),
            )
            if new_footer.rows != key.rows:
                raise AttemptFailed(
                    f"{store.uri}/{key.part_key} would have {new_footer.rows} rows, not {key.rows}; run again"
                )
            writer.close(new_footer)
        return commit_replacement(store, key, new, new_footer, version, raise_if_discarded), writer.examples
    finally:
        for path in (old, new):
            with suppress(OSError):  # the scratch folder is deleted at the end
                path.unlink(missing_ok=True)


def _without_version(ref: ImageRef, max_bytes: int | None) -> ImageRef:
    # The planned size still limits how many images are read at once.
    size_counts = ref.size is not None and (max_bytes is None or ref.size <= max_bytes)
    return replace(ref, size=ref.size if size_counts else None, etag=None)


def _download_part(store: Store, key: ShardKey, path: Path) -> tuple[str, PartFooter]:
    """Read the whole part with one request into a local file; return its version and its footer."""
    try:
        stored = store.read(key.part_key)
    except NotFound as error:
        raise AttemptFailed(f"{store.uri}/{key.part_key} is gone; run again to make it anew") from error
    path.write_bytes(stored.data)
    try:
        footer = PartFooter.from_json((pq.read_metadata(path).metadata or {})[PartFooter.KEY.encode()])
    except (pa.ArrowException, KeyError, ValueError, TypeError) as error:
        raise damaged_part_error(store, key.part_key, error) from error
    return stored.version or "", footer


def _merge_rows(store: Store, key: ShardKey, old: Path, retried: pa.Table) -> Iterator[pa.RecordBatch]:
    """Yield the rows of the old part in their order, with the retried rows in place of its error rows.

    An example, `e` for an error row and `r` for a retried one:

        old part    0  1e 2  3e | 4e 5        two batches
        retried        1r    3r   4r          rows 0 and 1 belong to the first batch, row 2 to the second
        new part    0  1r 2  3r | 4r 5
    """
    used = 0
    with pq.ParquetFile(old) as file:
        for batch in file.iter_batches(_ROWS_PER_BATCH):
            stages = batch.column("error_stage")
            replacements = retried.slice(used, len(stages) - stages.null_count)
            used += replacements.num_rows
            error_positions = batch.filter(pc.is_valid(stages)).column("position").to_pylist()
            if replacements.column("position").to_pylist() != error_positions:
                raise _other_rows_error(store, key)
            good = pa.Table.from_batches([batch.filter(pc.is_null(stages))])
            merged = pa.concat_tables([good, replacements.select(good.column_names)]).sort_by("position")
            yield from merged.replace_schema_metadata(None).combine_chunks().to_batches()
    if used != retried.num_rows:
        raise _other_rows_error(store, key)


def _other_rows_error(store: Store, key: ShardKey) -> AttemptFailed:
    return AttemptFailed(f"{store.uri}/{key.part_key} holds other error rows than those that were retried; run again")


@contextmanager
def _check_unchanged(store: Store, key: ShardKey) -> Iterator[None]:
    """Read several pieces of a part inside; pieces that do not fit together may come from two versions of it.

    Raises:
        AttemptFailed: The part is gone, or changed meanwhile.
        CheckFailed: The part did not change: it is damaged or not batchjob's.
    """
    try:
        version = store.stat(key.part_key).version
        yield
    except NotFound as error:
        raise AttemptFailed(f"{store.uri}/{key.part_key} is gone; run again to make it anew") from error
    except CheckFailed as error:
        if store.stat(key.part_key).version != version:
            raise AttemptFailed(f"{store.uri}/{key.part_key} was changed while it was read; run again") from error
        raise


def _add_values(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in (*one, *(other.keys() - one.keys()))}


def _join_configs(first: str, retried: str) -> str:
    """Name the execution configs by which the rows were made: `bf16, retried by eager fp32`."""
    return first if retried in first else f"{first}, retried by {retried}"
