"""The contract of a plan: row schema, model digest, image shape and decisions that all its workers share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from batchjob.errors import InvalidJob
from batchjob.plan.head import PlanHead, report_damage
from batchjob.storage.store import Store, put_or_get, read_if_present

__all__ = ["Contract", "put_or_read", "read_contract", "verify"]

_METADATA_KEY = b"batchjob.contract"


@dataclass(frozen=True)
class Contract:
    """The decisions of the first worker that has warmed up, for all workers of a plan.

    Attributes:
        schema: Arrow schema of the rows in every part.
        model_digest: SHA-256 of weights and model code, hexadecimal.
        image_shape: Shape `(c, h, w)` of a preprocessed image; None if images differ in shape.
        decisions: Values found for settings that the job leaves at `auto`, by dotted name, such as
            `{"task.activation": "softmax"}`; empty in plans of versions that decided nothing.
        files_id: Id of the record of the files that the job names, such as weights and code (see
            `driver/job_files.py`); empty in plans of versions that kept none.
    """

    schema: pa.Schema
    model_digest: str
    image_shape: tuple[int, ...] | None
    decisions: Mapping[str, str] = field(default_factory=dict)
    files_id: str = ""


def put_or_read(store: Store, head: PlanHead, contract: Contract) -> Contract:
    """Store a worker's contract if the plan has none; return the stored one, whose image shape and decisions count.

    Args:
        store: Output of the job.
        head: Head of the plan.
        contract: Contract as this worker would have it.
    """
    key = f"{head.folder}schema.arrow"
    metadata = {
        "model": contract.model_digest,
        "size": contract.image_shape,
        "decisions": dict(contract.decisions),
        "files": contract.files_id,
    }
    body = contract.schema.with_metadata({_METADATA_KEY: json.dumps(metadata)}).serialize().to_pybytes()
    stored_body = put_or_get(store, key, body)
    with report_damage(store, key):
        return _parse_contract(stored_body)


def read_contract(store: Store, head: PlanHead) -> Contract | None:
    """Return the contract of a plan; None if no worker has begun it yet."""
    key = f"{head.folder}schema.arrow"
    if (stored := read_if_present(store, key)) is None:
        return None
    with report_damage(store, key):
        return _parse_contract(stored.data)


def verify(stored: Contract, contract: Contract, uri: str) -> None:
    """Check that a worker that has adopted the plan's decisions makes the rows that the plan's contract promises.

    Args:
        stored: Contract of the plan.
        contract: Contract of the worker.
        uri: Output of the job, for messages.

    Raises:
        InvalidJob: The worker has another schema or model digest.
    """
    if stored.model_digest != contract.model_digest:
        raise InvalidJob(
            f"the model loaded here has digest {contract.model_digest[:12]}, the plan at {uri} was begun with "
            f"{stored.model_digest[:12]}: weights or model code changed meanwhile; restore them, or start anew "
            f"with `batchjob run --fresh` or `batchjob discard {uri} --yes`"
        )
    if not stored.schema.equals(contract.schema):
        raise InvalidJob(
            f"rows would have another schema here than the plan at {uri} fixed "
            f"({_describe_difference(stored, contract)}); use the versions it was begun with, or `batchjob discard` it"
        )


def _describe_difference(stored: Contract, contract: Contract) -> str:
    there, here = set(map(str, stored.schema)), set(map(str, contract.schema))
    return f"here {sorted(here - there)}, there {sorted(there - here)}"


def _parse_contract(data: bytes) -> Contract:
    schema = pa.ipc.read_schema(pa.py_buffer(data))
    metadata = json.loads(schema.metadata[_METADATA_KEY])
    image_shape = tuple(metadata["size"]) if metadata["size"] else None
    decisions = {str(name): str(value) for name, value in metadata.get("decisions", {}).items()}
    files_id = str(metadata.get("files", ""))
    return Contract(schema.remove_metadata(), metadata["model"], image_shape, decisions, files_id)
