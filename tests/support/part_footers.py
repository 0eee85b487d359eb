"""Footers of parts, of which a test names only the fields that matter to it."""

from __future__ import annotations

from typing import Any

from batchjob.output.provenance import PartFooter
from batchjob.types import ShardKey

__all__ = ["make_footer"]


def make_footer(key: ShardKey, **fields: Any) -> PartFooter:
    """Make the footer of a shard's part, without error rows, seconds and versions unless `fields` have them."""
    defaults: dict[str, Any] = {
        "plan": "plan", "shard": key.id, "index": key.index, "attempt": "attempt", "revision": key.revision,
        "fingerprint": "f", "model": "m", "rows": key.rows, "failed": 0, "errors": {}, "seconds": {}, "versions": {},
    }  # fmt: skip
    return PartFooter(**defaults | fields)
