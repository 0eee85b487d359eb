"""What the first warmed-up worker fixes for all workers of a plan: row schema, model digest, the images' shape."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pyarrow as pa

from batchjob.errors import InvalidJob
from batchjob.plan.head import PlanHead, report_damage
from batchjob.storage.store import Store, put_or_get

__all__ = ["Contract", "put_or_verify"]

_CONTRACT_META = b"batchjob.contract"


@dataclass(frozen=True)
class Contract:
    """What the first warmed-up worker fixed for all: row schema, model digest, the images' shape as prepared."""

    schema: pa.Schema
    model_digest: str
    image_shape: tuple[int, ...] | None


def put_or_verify(store: Store, head: PlanHead, contract: Contract) -> Contract:
    """Put the contract if absent, and return the one that stands; its image size is the one that counts.

    Raises:
        InvalidJob: the one that stands has another schema or model digest.
    """
    key = f"{head.folder}schema.arrow"
    facts = json.dumps({"model": contract.model_digest, "size": contract.image_shape})
    body = contract.schema.with_metadata({_CONTRACT_META: facts}).serialize().to_pybytes()
    stands = put_or_get(store, key, body)
    with report_damage(store, key):
        theirs = _parse_contract(stands)
    if theirs.model_digest != contract.model_digest:
        raise InvalidJob(
            f"the model loaded here has digest {contract.model_digest[:12]}, the plan at {store.uri} was begun with "
            f"{theirs.model_digest[:12]}: weights or model code changed meanwhile; restore them, or `batchjob discard "
            f"{store.uri} --yes` and run again"
        )
    if not theirs.schema.equals(contract.schema):
        raise InvalidJob(
            f"rows would have another schema here than the plan at {store.uri} fixed "
            f"({_schema_difference(theirs, contract)}); use the versions it was begun with, or `batchjob discard` it"
        )
    return theirs


def _schema_difference(theirs: Contract, ours: Contract) -> str:
    there, here = set(map(str, theirs.schema)), set(map(str, ours.schema))
    return f"here {sorted(here - there)}, there {sorted(there - here)}"


def _parse_contract(data: bytes) -> Contract:
    schema = pa.ipc.read_schema(pa.py_buffer(data))
    facts = json.loads(schema.metadata[_CONTRACT_META])
    size = tuple(facts["size"]) if facts["size"] else None
    return Contract(schema.remove_metadata(), facts["model"], size)
