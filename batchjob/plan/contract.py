"""The contract of a plan: row schema, model digest and image shape that all its workers share."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pyarrow as pa

from batchjob.errors import InvalidJob
from batchjob.plan.head import PlanHead, report_damage
from batchjob.storage.store import Store, put_or_get

__all__ = ["Contract", "put_or_verify"]

_METADATA_KEY = b"batchjob.contract"


@dataclass(frozen=True)
class Contract:
    """The decisions of the first worker that has warmed up, for all workers of a plan.

    Attributes:
        schema: Arrow schema of the rows in every part.
        model_digest: SHA-256 of weights and model code, hexadecimal.
        image_shape: Shape `(c, h, w)` of a preprocessed image; None if images differ in shape.
    """

    schema: pa.Schema
    model_digest: str
    image_shape: tuple[int, ...] | None


def put_or_verify(store: Store, head: PlanHead, contract: Contract) -> Contract:
    """Store a worker's contract if the plan has none; return the stored one, whose image shape counts.

    Args:
        store: Output of the job.
        head: Head of the plan.
        contract: Contract as this worker would have it.

    Raises:
        InvalidJob: The stored contract has another schema or model digest.
    """
    key = f"{head.folder}schema.arrow"
    metadata = json.dumps({"model": contract.model_digest, "size": contract.image_shape})
    body = contract.schema.with_metadata({_METADATA_KEY: metadata}).serialize().to_pybytes()
    stored_body = put_or_get(store, key, body)
    with report_damage(store, key):
        stored = _parse_contract(stored_body)
    if stored.model_digest != contract.model_digest:
        raise InvalidJob(
            f"the model loaded here has digest {contract.model_digest[:12]}, the plan at {store.uri} was begun with "
            f"{stored.model_digest[:12]}: weights or model code changed meanwhile; restore them, or `batchjob discard "
            f"{store.uri} --yes` and run again"
        )
    if not stored.schema.equals(contract.schema):
        raise InvalidJob(
            f"rows would have another schema here than the plan at {store.uri} fixed "
            f"({_describe_difference(stored, contract)}); use the versions it was begun with, or `batchjob discard` it"
        )
    return stored


def _describe_difference(stored: Contract, contract: Contract) -> str:
    there, here = set(map(str, stored.schema)), set(map(str, contract.schema))
    return f"here {sorted(here - there)}, there {sorted(there - here)}"


def _parse_contract(data: bytes) -> Contract:
    schema = pa.ipc.read_schema(pa.py_buffer(data))
    metadata = json.loads(schema.metadata[_METADATA_KEY])
    image_shape = tuple(metadata["size"]) if metadata["size"] else None
    return Contract(schema.remove_metadata(), metadata["model"], image_shape)
