"""Invariants of an output, checked after every write on its bytes alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchjob.storage.objects import ObjectData
from tests.support.memory_store import Call

__all__ = ["InvariantViolation", "Invariants", "read_positions"]

_PLAN = re.compile(r"_batchjob/plans/(\d{4})/(head\.json|discarded|schema\.arrow|chunk-(\d{7})\.arrow)")
_PART = re.compile(r"predictions/part-(\d{7})-([0-9a-f]{16})\.parquet")
_LEASE = re.compile(r"_batchjob/lease/(\d{10})\.json")


class InvariantViolation(AssertionError):
    """An invariant does not hold."""


@dataclass
class _PlanRecord:
    """Knowledge about one plan."""

    id: str = ""
    size: int = 0
    discarded: bool = False
    chunks: dict[int, dict[str, Any]] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)
    shards: dict[str, tuple[int, int]] = field(default_factory=dict)  # part key → first position, rows


class Invariants:
    """Check each object that is written or deleted.

    Args:
        images: Names of the images that a plan must hold, in order.

    Attributes:
        late_parts: Parts that were put when their plan was already discarded.
        commits: Number of parts committed.
        replacements: Number of parts replaced by a retry.
    """

    def __init__(self, images: list[str]) -> None:
        self._images = images
        self._objects: dict[str, ObjectData] = {}
        self._plans: dict[int, _PlanRecord] = {}
        self._parts: dict[str, tuple[_PlanRecord, str]] = {}  # all parts that were ever put, with their attempts
        self.late_parts: set[str] = set()
        self._owners: dict[str, str] = {}
        self._calls: Sequence[Call] = ()
        self.commits = self.replacements = 0

    @property
    def current_plan(self) -> _PlanRecord | None:
        """The plan in force; None if there is none."""
        return next((plan for plan in self._plans.values() if not plan.discarded), None)

    @property
    def discards(self) -> int:
        """Number of discarded plans."""
        return sum(plan.discarded for plan in self._plans.values())

    @property
    def is_empty(self) -> bool:
        """True if no plan is in force and there is neither `_SUCCESS` nor any part."""
        return self.current_plan is None and not any(
            key.startswith(("predictions/", "_SUCCESS")) for key in self._objects
        )

    @property
    def stale_parts(self) -> set[str]:
        """Parts of discarded plans that are still there."""
        return {key for key, (owner, _) in self._parts.items() if owner.discarded and key in self._objects}

    def check(self, objects: Mapping[str, ObjectData], calls: Sequence[Call] = ()) -> None:
        """Check the objects; raise InvariantViolation if an invariant does not hold.

        Args:
            objects: All objects.
            calls: Calls of the last writer; its write is the last of them.
        """
        before, self._calls = self._objects, calls
        if objects.keys() == before.keys() and all(before[key] is stored for key, stored in objects.items()):
            return
        self._objects = dict(objects)
        for key in before.keys() - objects.keys():
            self._check_deleted(key)
        for key in sorted(key for key, stored in objects.items() if before.get(key) is not stored):
            self._check_written(key, objects[key], before.get(key))
        self._check_success(objects, before.get("_SUCCESS") is not objects.get("_SUCCESS"))

    def _check_deleted(self, key: str) -> None:
        # An old epoch was deleted. A late driver that creates it again must notice that, and end.
        self._owners.pop(key, None)
        if key == "_SUCCESS":
            verb = self._calls[-1].method if self._calls else ""
            _require(verb == "delete_if_match", "_SUCCESS was deleted without a condition")
        elif key in self._parts:
            _require(self._parts[key][0].discarded, f"{key} of a plan in force was deleted")
        else:
            _require(not _PLAN.fullmatch(key), f"{key} was deleted")

    def _check_written(self, key: str, stored: ObjectData, before: ObjectData | None) -> None:
        if match := _PLAN.fullmatch(key):
            _require(before is None, f"{key} was written twice")
            self._check_plan_object(int(match[1]), match[2], stored)
        elif match := _PART.fullmatch(key):
            if before is not None:
                self._check_replacement(key, before, stored)
            self._check_part(key, match[2], stored)
        elif _LEASE.fullmatch(key):
            owner = json.loads(stored.data)["owner"]
            _require(self._owners.setdefault(key, owner) == owner, f"{key} passed from one owner to another")
        else:
            _require(not key.startswith("predictions/"), f"{key} is no part")

    # -- plan ----------------------------------------------------------------------------------------------------------

    def _check_plan_object(self, number: int, name: str, stored: ObjectData) -> None:
        _require(all(self._plans[n].discarded for n in self._plans if n < number), f"plan {number} beside one in force")
        plan = self._plans.setdefault(number, _PlanRecord())
        if name == "head.json":
            summary = json.loads(stored.data)
            plan.id, plan.size = summary["plan"], summary["shard_size"]
        elif name == "discarded":
            plan.discarded = True
        elif name.startswith("chunk-"):
            self._check_chunk(plan, stored)

    def _check_chunk(self, plan: _PlanRecord, stored: ObjectData) -> None:
        with pa.ipc.open_stream(stored.data) as stream:
            table = stream.read_all()
        summary = json.loads(table.schema.metadata[b"batchjob.chunk"])
        number, start = summary["number"], summary["start"]
        _require(summary["plan"] == plan.id, f"chunk {number} of another plan")
        plan.chunks[number], plan.digests[number] = summary, hashlib.sha256(stored.data).hexdigest()
        _require(sorted(plan.chunks) == list(range(len(plan.chunks))), "a chunk before its predecessor")
        for chunk, next_chunk in pairwise(plan.chunks[n] for n in sorted(plan.chunks)):
            _require(
                chunk["cursor"]["rows"] == next_chunk["start"] and not chunk["last"], "chunks do not follow each other"
            )
            _require(next_chunk["previous"] == plan.digests[chunk["number"]], "a chunk does not know its predecessor")
        end = summary["cursor"]["rows"]
        _require(table.column("uri").to_pylist() == self._images[start:end], f"chunk {number} holds other images")
        _require(not summary["last"] or end == len(self._images), "the plan ends before its input")
        for shard, rows in summary["shards"]:
            key = f"predictions/part-{start // plan.size:07d}-{shard}.parquet"
            _require(key not in plan.shards, f"{key} is planned twice")
            plan.shards[key] = start, rows
            start += rows
        _require(start == end, f"shards of chunk {number} do not add up")

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _check_part(self, key: str, shard: str, stored: ObjectData) -> None:
        footer, positions, uris = read_positions(stored)
        owner = next((plan for plan in self._plans.values() if plan.id == footer["plan"]), None)
        _require(owner is not None and key in owner.shards, f"{key} belongs to no plan")
        assert owner is not None
        start, count = owner.shards[key]
        _require(footer["shard"] == shard and footer["rows"] == count, f"{key}: its footer is another shard's")
        _require(positions == list(range(start, start + count)), f"{key}: holds positions {positions}")
        _require(uris == self._images[start : start + count], f"{key}: holds {uris}")
        attempt = footer["attempt"]
        if owner.discarded:
            self._check_tombstone_was_read(key)
            self.late_parts |= {key} - self._parts.keys()
        elif footer["revision"] == 0:
            _require(self._parts.get(key, (owner, attempt))[1] == attempt, f"{key} was committed twice")
            self.commits += 1
        self._parts[key] = owner, attempt

    def _check_replacement(self, key: str, before: ObjectData, stored: ObjectData) -> None:
        """Check that a part was replaced by its next revision, with the same rows except those that held an error."""
        old, new = read_part(before), read_part(stored)
        _require(new[0]["revision"] == old[0]["revision"] + 1, f"{key} was replaced by another than its next revision")
        good = [row for row in old[1] if row["error_stage"] is None]
        _require(all(row in new[1] for row in good), f"{key}: a row that worked was lost")
        _require(len(good) < len(old[1]), f"{key} was replaced, though all of its rows worked")
        if "_SUCCESS" in self._objects:
            keys_read = [call.key for call in self._calls[-3:-1]]
            _require("_SUCCESS" in keys_read, f"{key} was replaced under a _SUCCESS that was not read before")
        self.replacements += 1

    def _check_success(self, objects: Mapping[str, ObjectData], is_new: bool) -> None:
        """Check that `_SUCCESS` lists exactly the parts of the complete plan, and that all of them are there."""
        if "_SUCCESS" not in objects:
            return
        summary = json.loads(objects["_SUCCESS"].data)
        plan = next(plan for plan in self._plans.values() if plan.id == summary["plan"])
        present = {key for key in objects if key.startswith("predictions/")}
        listed = {part["name"]: part for part in summary["parts"]}
        _require(bool(plan.chunks) and plan.chunks[len(plan.chunks) - 1]["last"], "_SUCCESS before the plan's end")
        _require(listed.keys() == plan.shards.keys(), "_SUCCESS lists other parts than the plan")
        bad = sum(part["failed"] for part in listed.values())
        _require(bad <= sum("bad" in name for name in self._images), "_SUCCESS says that a good image failed")
        counts = {"planned": len(self._images), "predicted": len(self._images) - bad, "failed": bad}
        _require(summary["counts"] == counts, f"_SUCCESS says {summary['counts']}")
        # Objects that were there when the plan was discarded are deleted one after the other.
        if plan.discarded:
            if is_new:
                self._check_tombstone_was_read("_SUCCESS")
            return
        _require(listed.keys() <= present, "_SUCCESS lists parts that are not there")
        other = {name for name, part in listed.items() if part["etag"] != objects[name].etag}
        # A late worker of a retry may still replace its part, see `_check_replacement`. The next run corrects that.
        _require(all(read_positions(objects[name])[0]["revision"] for name in other), "_SUCCESS has other tags")

    def _check_tombstone_was_read(self, key: str) -> None:
        """Check that the last call before a write for a discarded plan was the read of its tombstone."""
        previous = self._calls[-2] if len(self._calls) > 1 else None
        is_tombstone = previous is not None and previous.key.endswith("/discarded")
        _require(is_tombstone, f"{key} of a discarded plan was put without a read of its tombstone")

    def check_complete(self, repaired: bool = False) -> None:
        """Check that the output is complete: every position once, nothing else, and `_SUCCESS` says the same.

        Args:
            repaired: No row may hold an error any more.
        """
        plan, objects = self.current_plan, self._objects
        _require(plan is not None and "_SUCCESS" in objects, "no _SUCCESS at the end")
        assert plan is not None
        summary = json.loads(objects["_SUCCESS"].data)
        _require(summary["plan"] == plan.id, "_SUCCESS is another plan's")
        tags = {part["name"]: part["etag"] for part in summary["parts"]}
        _require(all(objects[name].etag == tag for name, tag in tags.items()), "_SUCCESS has other tags at the end")
        _require(not repaired or not summary["counts"]["failed"], "an error row was not retried")
        present = sorted(key for key in objects if key.startswith("predictions/"))
        found = [position for key in present for position in read_positions(objects[key])[1]]
        missing, twice = set(range(len(self._images))) - set(found), len(found) - len(set(found))
        _require(not missing and not twice, f"missing: {sorted(missing)}, twice: {twice} of {found}")
        _require(present == sorted(plan.shards), "other parts than the plan's")


def read_positions(stored: ObjectData) -> tuple[dict[str, Any], list[int], list[str]]:
    """Read the footer, the positions and the URIs of a part."""
    with pq.ParquetFile(pa.BufferReader(stored.data)) as file:
        table = file.read(columns=["position", "uri"], use_threads=False)
        footer = json.loads(file.metadata.metadata[b"batchjob"])
    return footer, table.column("position").to_pylist(), table.column("uri").to_pylist()


def read_part(stored: ObjectData) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read the footer and all rows of a part."""
    with pq.ParquetFile(pa.BufferReader(stored.data)) as file:
        found: list[dict[str, Any]] = file.read(use_threads=False).to_pylist()
        return json.loads(file.metadata.metadata[b"batchjob"]), found


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvariantViolation(message)
