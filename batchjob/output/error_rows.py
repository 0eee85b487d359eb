"""Error rows of the committed parts: all rows of an output, or the positions within one part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchjob.errors import CheckFailed
from batchjob.output.commit import list_parts, read_footers
from batchjob.storage.store import Store

__all__ = ["damaged_part_error", "read_error_positions", "read_error_rows"]

_COLUMNS = ["position", "uri", "error_stage", "error_type", "error_message"]


def read_error_rows(store: Store) -> Iterator[dict[str, Any]]:
    """Read all error rows, in plan order. Reads every footer, and these columns of parts with error rows.

    Returns:
        Dicts with `position`, `uri`, `error_stage`, `error_type` and `error_message`.
    """
    for key, footer in read_footers(store, sorted(list_parts(store))):
        if footer.failed:
            yield from _read_columns(store, key, _COLUMNS).to_pylist()


def read_error_positions(store: Store, key: str) -> frozenset[int]:
    """Read the positions of a part's error rows.

    Raises:
        NotFound: There is no such part.
        CheckFailed: The part is damaged.
    """
    return frozenset(_read_columns(store, key, ["position"]).column("position").to_pylist())


def damaged_part_error(store: Store, key: str, error: Exception) -> CheckFailed:
    """Return the exception for a part whose footer is batchjob's and whose rows cannot be read."""
    reason = " ".join(str(error).split())[:200]
    return CheckFailed(f"{store.uri}/{key} is damaged ({reason}); remove it and run with --repair")


def _read_columns(store: Store, key: str, columns: list[str]) -> pa.Table:
    try:
        with store.open(key) as file:
            return pq.read_table(file, columns=columns, filters=[("error_stage", "!=", "")])
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged_part_error(store, key, error) from error
