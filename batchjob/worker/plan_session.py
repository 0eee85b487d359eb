"""JPEG files that the loader has left to the device, decoded there; what its decoder refuses is the CPU's."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from batchjob.plan.head import PlanHead
from batchjob.plan.reader import PlanReader
from batchjob.storage.store import Store, put_or_get
from batchjob.types import ShardKey

__all__ = ["claim_first_attempt"]


def claim_first_attempt(store: Store, head: PlanHead, key: ShardKey) -> bool:
    """Whether nobody has had this shard before, in any process; to be asked once by each who takes it.

    A decoder that crashes on a device takes the whole worker with it: its shard is decoded on the CPU then.

    Raises:
        Unavailable: the store cannot be reached.
    """
    ours = secrets.token_hex(8).encode()
    return put_or_get(store, f"{head.folder}decoding/{key.id}", ours) == ours


_SAMPLE = 128  # images that a trial may look at


@dataclass(frozen=True)
class _JoinedPlan:
    """What the worker knows of the plan it works on."""

    head: PlanHead
    reader: PlanReader


def _digest_of(fingerprint: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
