"""What is committed: the one PUT that commits or replaces a part, the look after a doubtful answer, `_SUCCESS`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchjob.errors import CheckFailed
from batchjob.output.commit import list_parts, read_footers
from batchjob.storage.store import Store

__all__ = ["damaged_part_error", "read_error_positions", "read_error_rows"]

_ERROR_COLUMNS = ["position", "uri", "error_stage", "error_type", "error_message"]


def read_error_rows(store: Store) -> Iterator[dict[str, Any]]:
    """Error rows as dicts (`position, uri, error_stage, error_type, error_message`), in plan order.

    Reads the footers, and of parts with errors these columns alone.
    """
    for key, provenance in read_footers(store, sorted(list_parts(store))):
        if not provenance.failed:
            continue
        yield from _error_rows(store, key, _ERROR_COLUMNS).to_pylist()


def read_error_positions(store: Store, key: str) -> frozenset[int]:
    """Positions of a part's error rows. Raises NotFound, CheckFailed."""
    return frozenset(_error_rows(store, key, ["position"]).column("position").to_pylist())


def damaged_part_error(store: Store, key: str, error: Exception) -> CheckFailed:
    """What is said of a part whose footer is ours and whose rows cannot be read."""
    reason = " ".join(str(error).split())[:200]
    return CheckFailed(f"{store.uri}/{key} is damaged ({reason}); remove it and run with --repair")


def _error_rows(store: Store, key: str, columns: list[str]) -> pa.Table:
    try:
        with store.open(key) as file:
            return pq.read_table(file, columns=columns, filters=[("error_stage", "!=", "")])
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged_part_error(store, key, error) from error
