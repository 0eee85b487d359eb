"""Which images, in which shards: frozen once, in numbered chunks, each put-if-absent; adopted by whoever comes later.

A plan lies in `_batchjob/plans/NNNN/`: `head.json` (who and what), `chunk-NNNNNNN.arrow` (Arrow IPC streams of refs and
passthrough columns, their shards in the schema's metadata), `schema.arrow` (what all workers agreed on), `discarded`
(the tombstone). Nothing here is ever rewritten.
"""

from __future__ import annotations

from batchjob.plan.contract import Contract, agree
from batchjob.plan.cutting import CHUNK_BYTES, CHUNK_ROWS, Chunk, PlanReader, chunks, extend
from batchjob.plan.head import FORMAT, Head, bury, current, freeze, is_buried, is_discarded, new_head

__all__ = [
    "CHUNK_BYTES",
    "CHUNK_ROWS",
    "FORMAT",
    "Chunk",
    "Contract",
    "Head",
    "PlanReader",
    "agree",
    "bury",
    "chunks",
    "current",
    "extend",
    "freeze",
    "is_buried",
    "is_discarded",
    "new_head",
]
